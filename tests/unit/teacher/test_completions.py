"""The client of a completions server, against a small server that answers as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.errors import TeacherError
from kdrl_mcore.teacher import servers
from kdrl_mcore.teacher.completions import CompletionServers
from kdrl_mcore.teacher.servers import Expected
from kdrl_mcore.types import Rollout
from tests.support.completions_server import completions_server

TOKENS, MAX_LOGPROBS = 12, 4
TABLES = [np.log(np.random.default_rng(seed).dirichlet(np.ones(TOKENS), size=TOKENS)) for seed in (2, 3)]
"""log T of the next token, given the one before it, of two models."""
WORDS = [f"w{index}" for index in range(TOKENS)]


def server(answers: int | list[int] = 1000, table: int = 0, **settings: Any) -> Any:
    def log_probs(ids: Sequence[int]) -> np.ndarray:
        return TABLES[table][list(ids)[:-1]]

    settings = {"max_logprobs": MAX_LOGPROBS, "max_model_len": 64, "texts": WORDS.__getitem__} | settings
    return completions_server(log_probs, answers=answers, **settings)


def client_of(*addresses: str, token: str = "secret", **settings: Any) -> CompletionServers:
    return CompletionServers(lambda: dict.fromkeys(addresses, token), **settings)


def rollouts() -> list[Rollout]:
    draw = np.random.default_rng(3)
    sizes = [(2, 1), (3, 7), (1, 4), (5, 2), (2, 9)]
    return [
        Rollout(f"p{i}", i, draw.integers(TOKENS, size=n), draw.integers(TOKENS, size=m), np.zeros(m, np.float32), "length", 0)
        for i, (n, m) in enumerate(sizes)
    ]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT_SECONDS", 0.01)


def assert_scores(found: list[Any], k: int) -> None:
    for rollout, scores in zip(rollouts(), found, strict=True):
        whole = [*rollout.prompt_token_ids, *rollout.response_token_ids]
        rows = TABLES[0][whole[len(rollout.prompt_token_ids) - 1 : -1]]
        np.testing.assert_allclose(scores.log_probs, rows[np.arange(len(rows)), rollout.response_token_ids], rtol=1e-6)
        sampled, top, ids = scores.states.split((1, k, k), dim=1)
        np.testing.assert_array_equal(sampled[:, 0], scores.log_probs)
        np.testing.assert_array_equal(ids, np.argsort(-rows, axis=1)[:, :k])
        np.testing.assert_allclose(top, -np.sort(-rows, axis=1)[:, :k], rtol=1e-6)


def test_scores_are_those_of_the_response_tokens() -> None:
    """Also when one of two servers fails half-way."""
    with server() as good, server(answers=1) as dying:
        client = client_of(dying, good, model="teacher", top_k=3, concurrency=1, batch_tokens=9)
        assert_scores(client.score(rollouts(), frozenset()), 3)
        client.close()


def test_a_server_that_is_well_again_is_asked_again() -> None:
    left = [1]
    with server() as good, server(answers=left) as ill:
        client = client_of(ill, good, model="teacher", top_k=3, concurrency=1, batch_tokens=9)
        client.score(rollouts(), frozenset())
        assert left[0] < 0
        left[0] = 100
        assert_scores(client.score(rollouts(), frozenset()), 3)
        assert left[0] < 100
        client.close()


def test_a_server_that_was_started_again_elsewhere_is_found() -> None:
    with server(answers=1) as dying, server() as again:
        found = [{dying: "secret"}, {again: "secret"}]
        client = CompletionServers(lambda: found.pop(0) if len(found) > 1 else found[0], top_k=2, concurrency=1, batch_tokens=9)
        assert_scores(client.score(rollouts(), frozenset()), 2)


def test_what_cannot_work_is_refused_by_name() -> None:
    with server() as address, server(answers=0) as dead, server(table=1) as other, server(names=("a", "b")) as two:

        def told(
            *more: str, token: str = "secret", texts: Sequence[str] = WORDS, top_k: int = 2, longest: int = 20, **rest: Any
        ) -> str:
            client = client_of(*(more or (address,)), token=token, top_k=top_k)
            with pytest.raises(TeacherError) as error:
                client.check(Expected(np.arange(TOKENS), texts, longest, **rest))
            return str(error.value)

        same = Expected(np.arange(TOKENS), WORDS, 20)
        assert client_of(address, top_k=4).check(same) == "teacher"
        with server(names=("teacher", "fingerprint:abc")) as named:
            assert client_of(named).check(Expected(np.arange(TOKENS), WORDS, 20, "abcd")) == "teacher (fingerprint abc)"
            assert "serves another model (fingerprint abc) than the teacher's path names (xyz)" in told(
                named, fingerprint="xyzw"
            )
        assert "refuses the token" in told(token="other")
        assert "another tokenizer: token 2 is 'w2' there and 'x' here" in told(texts=["w0", "w1", "x", *WORDS[3:]])
        assert "max allowed: 4" in told(top_k=5)
        assert "reads at most 64 tokens" in told(longest=64)
        assert "do not serve the same model: their log-probs of the same tokens differ by" in told(address, other)
        assert "serves a, b: name one of them (server.model)" in told(two)
        client = client_of(dead, model="teacher", attempts=2)
        with pytest.raises(
            TeacherError, match=r"no teacher's server scores prompt p0 and 4 more in 2 attempts: http://.*: status 500"
        ):
            client.score(rollouts(), frozenset())
