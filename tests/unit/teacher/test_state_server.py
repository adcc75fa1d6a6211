"""The server of hidden states: what is no request, or without the token, is refused before anything is scored."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import safetensors.numpy

from kdrl_mcore.teacher.state_server import ServedModel, StateServer, read_request, write_request
from kdrl_mcore.types import Rollout

SERVED = ServedModel("abc", 8, columns=10, positions=6)


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    ids = [np.array(each, np.int64) for each in (prompt, response)]
    return Rollout("p", 0, ids[0], ids[1], np.zeros(len(response), np.float32), "stop", 0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = StateServer(SERVED, None, "127.0.0.1", 0, "secret")
    server.start()
    yield f"http://127.0.0.1:{server.port}"
    server._http.shutdown()
    server._http.server_close()


def test_a_request_survives_the_way() -> None:
    asked = [rollout([1, 2, 3], [4, 5]), rollout([6], [7, 8, 9])]
    for found, sent in zip(read_request(write_request(asked), SERVED), asked, strict=True):
        np.testing.assert_array_equal(found.prompt_token_ids, sent.prompt_token_ids)
        np.testing.assert_array_equal(found.response_token_ids, sent.response_token_ids)


def test_what_is_no_request_is_refused(url: str) -> None:
    def answer(content: bytes, route: str = "score?temperature=1&wanted=log_probs", token: str = "secret") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(f"{url}/{route}", content=content, headers=headers, trust_env=False)

    def told(content: bytes) -> str:
        found = answer(content)
        assert found.status_code == 400
        return str(found.json()["error"]["message"])

    good = write_request([rollout([1], [2])])
    assert answer(good, token="other").status_code == 401 and answer(good, "nothing").status_code == 404
    for temperature in ("0", "-1", "nan", "inf", "hot"):
        assert answer(good, f"score?temperature={temperature}&wanted=log_probs").status_code == 400
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    assert "is not a request" in told(b"no safetensors")
    assert "is not a request" in told(safetensors.numpy.save({"ids": np.arange(3)}))
    wrong = {"ids": np.arange(3), "prompt_lengths": np.array([1]), "response_lengths": np.array([5])}
    assert "do not fit each other" in told(safetensors.numpy.save(wrong))
    assert "token ids must lie in [0, 10)" in told(write_request([rollout([1], [10])]))
    assert "has 7 tokens, more than 6" in told(write_request([rollout([1, 2, 3], [4, 5, 6, 7])]))
