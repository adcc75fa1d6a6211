"""The client of a completions server, against a small server that answers as vLLM does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.errors import TeacherError
from kdrl_mcore.teacher import completions
from kdrl_mcore.teacher.completions import CompletionServers
from kdrl_mcore.types import Rollout

TOKENS, MAX_LOGPROBS = 12, 4
TABLE = np.log(np.random.default_rng(2).dirichlet(np.ones(TOKENS), size=TOKENS))
"""log T of the next token, given the one before it."""
WORDS = [f"w{index}" for index in range(TOKENS)]


@contextmanager
def server(answers: int = 1000, token: str = "secret") -> Iterator[str]:
    """The address of a server that fails after so many answers."""
    left = [answers]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, body: Any) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": "teacher", "max_model_len": 64}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != f"Bearer {token}":
                return self.send(401, {})
            if body["prompt_logprobs"] > MAX_LOGPROBS:
                return self.send(400, {"error": {"message": f"greater than max allowed: {MAX_LOGPROBS}"}})
            left[0] -= 1
            if left[0] < 0:
                return self.send(500, {})
            choices = [
                {"index": number, "prompt_logprobs": entries(ids, body["prompt_logprobs"])}
                for number, ids in enumerate(body["prompt"])
            ]
            return self.send(200, {"choices": choices[::-1]})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def entries(ids: list[int], k: int) -> list[Any]:
    result: list[Any] = [None]
    for before, index in pairwise(ids):
        kept = {*np.argsort(-TABLE[before])[:k].tolist(), index}
        result.append({str(each): {"logprob": TABLE[before, each], "decoded_token": WORDS[each]} for each in kept})
    return result


def rollouts() -> list[Rollout]:
    draw = np.random.default_rng(3)
    sizes = [(2, 1), (3, 7), (1, 4), (5, 2), (2, 9)]
    return [
        Rollout(f"p{i}", i, draw.integers(TOKENS, size=n), draw.integers(TOKENS, size=m), np.zeros(m, np.float32), "length", 0)
        for i, (n, m) in enumerate(sizes)
    ]


def test_scores_are_those_of_the_response_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when one of two servers fails half-way."""
    monkeypatch.setattr(completions, "FIRST_WAIT_SECONDS", 0.01)
    with server() as good, server(answers=1) as dying:
        client = CompletionServers([dying, good], token="secret", model="teacher", concurrency=1)
        found = client.score(rollouts(), top_k=3, batch_tokens=9)
        client.close()
    for rollout, scores in zip(rollouts(), found, strict=True):
        whole = [*rollout.prompt_token_ids, *rollout.response_token_ids]
        rows = TABLE[whole[len(rollout.prompt_token_ids) - 1 : -1]]
        np.testing.assert_allclose(scores.log_probs, rows[np.arange(len(rows)), rollout.response_token_ids], rtol=1e-6)
        np.testing.assert_array_equal(scores.ids, np.argsort(-rows, axis=1)[:, :3])
        np.testing.assert_allclose(scores.top_log_probs, -np.sort(-rows, axis=1)[:, :3], rtol=1e-6)


def test_what_cannot_work_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "FIRST_WAIT_SECONDS", 0.01)
    probe = np.arange(5)
    with server() as address, server(answers=0) as dead:

        def told(token: str = "secret", texts: list[str] = WORDS[:5], top_k: int = 2, longest: int = 20) -> str:
            with pytest.raises(TeacherError) as error:
                CompletionServers([address], token=token).check(probe, texts, top_k, longest)
            return str(error.value)

        CompletionServers([address], token="secret").check(probe, WORDS[:5], 4, 20)
        assert "refuses the token" in told(token="other")
        assert "another tokenizer: token 2 is 'w2' there and 'x' here" in told(texts=["w0", "w1", "x", "w3", "w4"])
        assert "max allowed: 4" in told(top_k=5)
        assert "reads at most 64 tokens" in told(longest=64)
        client = CompletionServers([dead], token="secret", model="teacher", attempts=2)
        with pytest.raises(
            TeacherError, match=r"no teacher's server scores prompt p0 and 4 more in 2 attempts: http://.*: status 500"
        ):
            client.score(rollouts())
