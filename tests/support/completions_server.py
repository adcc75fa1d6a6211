"""A small server that answers as vLLM's completions interface does, from log-probs that a function computes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reference import dense

LogProbs = Callable[[Sequence[int]], np.ndarray]
"""Token ids -> log T of every token at the position of each id but the first [T - 1, V]."""


@contextmanager
def completions_server(
    log_probs: LogProbs,
    *,
    answers: int | list[int] = 10000,
    token: str | None = "secret",
    names: Sequence[str] = ("teacher",),
    texts: Callable[[int], str | None] = lambda _: None,
    max_model_len: int = 128,
    max_logprobs: int = 20,
) -> Iterator[str]:
    """The address of a server, which fails after so many answers.

    Args:
        answers: their number, or a list with it, which is counted down and may be changed.
        texts: the text of a token, as the server gives it; None: it gives none.
    """
    left = answers if isinstance(answers, list) else [answers]

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
            self.send(200, {"data": [{"id": name, "max_model_len": max_model_len} for name in names]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if token is not None and self.headers["Authorization"] != f"Bearer {token}":
                return self.send(401, {})
            if body["prompt_logprobs"] > max_logprobs:
                return self.send(400, {"error": {"message": f"greater than max allowed: {max_logprobs}"}})
            left[0] -= 1
            if left[0] < 0:
                return self.send(500, {})
            choices = [
                {"index": number, "prompt_logprobs": entries(ids, body["prompt_logprobs"])}
                for number, ids in enumerate(body["prompt"])
            ]
            return self.send(200, {"choices": choices[::-1]})

    def entries(ids: list[int], k: int) -> list[Any]:
        result: list[Any] = [None]
        for index, row in zip(ids[1:], log_probs(ids), strict=True):
            kept = {*np.argsort(-row)[:k].tolist(), index}
            result.append({str(each): {"logprob": float(row[each]), "decoded_token": texts(each)} for each in kept})
        return result

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def log_probs_of(model: Path, vocab_size: int) -> LogProbs:
    """Those of a dense model over the first columns."""
    loaded, lock = dense.load_model(model), threading.Lock()

    def log_probs(ids: Sequence[int]) -> np.ndarray:
        with lock, torch.no_grad():
            logits = loaded(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1, :vocab_size]
            return logits.log_softmax(-1).numpy()

    return log_probs
