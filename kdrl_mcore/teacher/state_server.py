"""A server that scores with a model of its own ranks and returns hidden states, log-probs and entropies, so that a divergence
over the whole vocabulary needs no logits to travel.

Rank 0 answers HTTP requests in threads; its main thread hands them to all ranks, which score them together. Requests and
answers are safetensors; nothing is unpickled that came over HTTP. `state_servers.py` is the client.

N responses, T response tokens of all of them, G the model's hidden size.
"""

from __future__ import annotations

import json
import math
import queue
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

from kdrl_mcore.config.derived import DISTRIBUTION, ENTROPIES, LOG_PROBS
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.parallel.collect import from_first_rank
from kdrl_mcore.teacher.hidden_states import HiddenStates
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.source import score_with
from kdrl_mcore.types import Rollout

IDLE_SECONDS = 30.0
"""How often rank 0 tells waiting ranks that there is nothing to do: a collective that waits longer than its time-out would end
the server."""
LARGEST_REQUEST = 2**28
"""Bytes of a request; 8 bytes stand for a token."""
OK, BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_LARGE = 200, 400, 401, 404, 413


@dataclass(frozen=True)
class ServedModel:
    """What a client checks.

    Attributes:
        fingerprint: that of the weights.
        hidden_size: G.
        columns: the vocabulary columns in the softmax of log-probs and entropies.
        positions: the most tokens of a prompt and a response.
    """

    fingerprint: str | None
    hidden_size: int
    columns: int
    positions: int


@dataclass(frozen=True)
class _Request:
    """One request: what is asked of which sequences, and where its answer goes."""

    wanted: frozenset[str]
    temperature: float
    rollouts: list[Rollout]
    answer: Future[bytes]


class _Refused(Exception):
    """A request that cannot be answered."""


class StateServer:
    """The HTTP side, on rank 0."""

    def __init__(self, served: ServedModel, tokenizer: Tokenizer | None, host: str, port: int, token: str | None) -> None:
        """Listen, without answering yet.

        Args:
            token: the bearer token that every request needs; None: none.
        """
        self._served, self._tokenizer, self._token = served, tokenizer, token
        self._requests: queue.Queue[_Request | None] = queue.Queue()
        answer = self._answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Nothing: a line for each request would fill the log."""

            def do_GET(self) -> None:
                answer(self)

            def do_POST(self) -> None:
                answer(self)

        self._http = ThreadingHTTPServer((host, port), Handler)
        self._http.daemon_threads = True

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self._http.server_address[1])

    def start(self) -> None:
        """Answer requests, in threads."""
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Let `next_request` return None."""
        self._requests.put(None)

    def next_request(self, seconds: float) -> _Request | None:
        """The next request; None to end.

        Raises:
            queue.Empty: there is none within this time.
        """
        return self._requests.get(timeout=seconds)

    def _answer(self, http: BaseHTTPRequestHandler) -> None:
        url, length = urlsplit(http.path), http.headers.get("Content-Length") or "0"
        given = http.headers.get("Authorization", "")
        allowed = self._token is None or secrets.compare_digest(given.encode(), f"Bearer {self._token}".encode())
        status, content = OK, b""
        try:
            if url.path == "/health":
                content = b"{}"
            elif not allowed or not length.isdecimal() or int(length) > LARGEST_REQUEST:
                status = UNAUTHORIZED if not allowed else TOO_LARGE
                http.close_connection = True  # the body is not read
            elif url.path == "/info":
                content = json.dumps(asdict(self._served)).encode()
            elif url.path == "/texts":
                ids = [int(each) for each in json.loads(http.rfile.read(int(length)))]
                texts = ["" if self._tokenizer is None else self._tokenizer.text_of(index) for index in ids]
                content = json.dumps(texts).encode()
            elif url.path == "/score":
                content = self._score(http.rfile.read(int(length)), dict(parse_qsl(url.query)))
            else:
                status, http.close_connection = NOT_FOUND, True
        except (_Refused, ValueError, TypeError, LookupError, OverflowError) as error:
            status, content = BAD_REQUEST, json.dumps({"error": {"message": str(error)}}).encode()
        http.send_response(status)
        http.send_header("Content-Length", str(len(content)))
        http.end_headers()
        http.wfile.write(content)

    def _score(self, body: bytes, settings: Mapping[str, str]) -> bytes:
        wanted = frozenset(settings.get("wanted", "").split(",")) & {LOG_PROBS, ENTROPIES, DISTRIBUTION}
        temperature = float(settings["temperature"])
        if not 0 < temperature < math.inf:
            raise _Refused(f"temperature={temperature:g} must be greater than 0")
        rollouts = read_request(body, self._served)
        answer: Future[bytes] = Future()
        self._requests.put(_Request(wanted, temperature, rollouts, answer))
        return answer.result()


def write_request(rollouts: list[Rollout]) -> bytes:
    """The token ids of some responses and of what stands before them."""
    ids = [np.concatenate((each.prompt_token_ids, each.response_token_ids)) for each in rollouts]
    tensors = {
        "ids": np.concatenate(ids).astype(np.int64),
        "prompt_lengths": np.array([len(each.prompt_token_ids) for each in rollouts], np.int64),
        "response_lengths": np.array([len(each.response_token_ids) for each in rollouts], np.int64),
    }
    return safetensors.numpy.save(tensors)


def read_request(body: bytes, served: ServedModel) -> list[Rollout]:
    """The responses of a request.

    Raises:
        _Refused: it is not one, or the model cannot read it.
    """
    try:
        tensors = safetensors.numpy.load(body)
        ids, prompts, responses = (tensors[name] for name in ("ids", "prompt_lengths", "response_lengths"))
        fits = ids.ndim == prompts.ndim == 1 and prompts.shape == responses.shape
        fits = fits and all(each.dtype == np.int64 for each in (ids, prompts, responses))
    except (SafetensorError, KeyError) as error:
        raise _Refused("the body is not a request (safetensors with ids, prompt_lengths, response_lengths)") from error
    if not fits or prompts.min(initial=1) < 1 or responses.min(initial=1) < 1 or int((prompts + responses).sum()) != len(ids):
        raise _Refused("ids, prompt_lengths and response_lengths do not fit each other")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < served.columns:
        raise _Refused(f"token ids must lie in [0, {served.columns})")
    if (prompts + responses).max(initial=0) > served.positions:
        raise _Refused(f"a prompt with its response has {(prompts + responses).max()} tokens, more than {served.positions}")
    rollouts, at = [], 0
    for prompt, response in zip(prompts.tolist(), responses.tolist(), strict=True):
        first, whole = ids[at : at + prompt], ids[at + prompt : at + prompt + response]
        rollouts.append(Rollout("", 0, first, whole, np.zeros(response, np.float32), "stop", 0))
        at += prompt + response
    return rollouts


def run_server(parts: ModelParts, server: StateServer | None, micro_tokens: int) -> None:
    """Score what clients ask for until the server is stopped. Collective over the world.

    Args:
        server: on rank 0.
        micro_tokens: tokens of a micro-batch.
    """
    while True:
        request: _Request | None = None
        task: tuple[frozenset[str], float, list[Rollout]] | str = "idle"
        if server is not None:
            try:
                request = server.next_request(IDLE_SECONDS)
                task = "end" if request is None else (request.wanted, request.temperature, request.rollouts)
            except queue.Empty:
                pass
        task = from_first_rank(task)
        if task == "end":
            return
        if isinstance(task, str):
            continue
        wanted, temperature, rollouts = task
        found = score_with(parts, dict(enumerate(rollouts)), wanted, temperature=temperature, micro_tokens=micro_tokens)
        if request is not None:
            request.answer.set_result(write_answer(found, len(rollouts)))


def write_answer(found: TeacherScores, responses: int) -> bytes:
    """The scores of a request, one response after the other: `log_probs`, `entropies` [T] and `states` [T, G], those that were
    asked for."""
    tensors: dict[str, torch.Tensor] = {}
    for name, values in (("log_probs", found.log_probs), ("entropies", found.entropies)):
        if values:
            tensors[name] = torch.from_numpy(np.concatenate([values[index] for index in range(responses)]))
    if isinstance(found.hidden, HiddenStates):
        assert len(found.hidden.local) == responses, "rank 0 holds every state of a model without data parallelism"
        tensors["states"] = torch.cat([found.hidden.local[index] for index in range(responses)])
    return safetensors.torch.save(tensors)
