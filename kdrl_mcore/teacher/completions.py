"""A client of servers that score token ids through vLLM's completions interface (`prompt_logprobs`).

The log-probs are those of the server's softmax at temperature 1, over all columns of its model.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.errors import TeacherError
from kdrl_mcore.types import Rollout, TokenFloats, TokenIds

FIRST_WAIT_SECONDS = 0.5
"""The wait before the second attempt of a request; it doubles with each further attempt, and up to half of it is random."""
IMPOSSIBLE = -9000.0
"""vLLM sends -9999 for a log-prob of minus infinity."""
_TRY_AGAIN = (408, 425, 429)


@dataclass(frozen=True)
class CompletionScores:
    """The scores of one response.

    Attributes:
        log_probs: log T of its tokens [T].
        ids, top_log_probs: the teacher's k most likely tokens at each position, and their log-probs [T, k].
    """

    log_probs: TokenFloats
    ids: TokenIds
    top_log_probs: NDArray[np.float32]


class CompletionServers:
    """Servers of the same model, which share the requests. One that fails is left out while another answers."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        token: str | None = None,
        model: str | None = None,
        concurrency: int = 16,
        attempts: int = 5,
        timeout: float = 300.0,
    ) -> None:
        """Args:
        addresses: the servers' base URLs, such as `http://127.0.0.1:8000`.
        token: the bearer token.
        model: the name of the model on the servers; None: the only one.
        concurrency: requests in flight per server.
        attempts: tries of one request, on any servers.
        timeout: seconds without an answer to one request.
        """
        assert addresses and attempts > 0
        self._servers = [address.rstrip("/") for address in addresses]
        self._in_flight = dict.fromkeys(self._servers, 0)
        self._alive = set(self._servers)
        self._lock = threading.Lock()
        self._model, self._concurrency, self._attempts = model, concurrency, attempts
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=False, limits=httpx.Limits(max_connections=None))

    def check(self, probe: TokenIds, texts: Sequence[str], top_k: int, longest: int) -> None:
        """Check that every server serves one and the same model, has the student's tokens, and answers what will be asked.

        Args:
            probe: token ids that the servers score.
            texts: the text of each of them, which the servers must give as well; empty where a token is no whole text.
            top_k: the most likely tokens that will be asked for.
            longest: the most tokens of a prompt and a response.

        Raises:
            TeacherError: naming the server and what to change.
        """
        for server in self._servers:
            served = self._served(server)
            model = self._model or next(iter(served))
            if model not in served or (self._model is None and len(served) > 1):
                raise TeacherError(f"the teacher's server {server} serves {', '.join(served)}: name one of them as the model")
            self._model = model
            limit = served[model]
            if limit is not None and longest >= limit:
                raise TeacherError(
                    f"the teacher's server {server} reads at most {limit} tokens, and prompt and response may have {longest}, "
                    "to which it adds one: raise its --max-model-len"
                )
            (choice,) = self._ask(server, [probe], top_k)
            for index, (entries, text) in enumerate(zip(choice[1:], texts[1:], strict=True), start=1):
                found = entries[str(int(probe[index]))].get("decoded_token")
                if text and found is not None and found != text:
                    raise TeacherError(
                        f"the teacher's server {server} has another tokenizer: token {probe[index]} is {found!r} there and "
                        f"{text!r} here"
                    )

    def score(
        self,
        rollouts: Sequence[Rollout],
        top_k: int = 0,
        batch_tokens: int = 16384,
        on_progress: Callable[[], None] = lambda: None,
    ) -> list[CompletionScores]:
        """The scores of each rollout, all or none.

        Args:
            batch_tokens: the most tokens of one request.
            on_progress: called after each answer.

        Raises:
            TeacherError: a request failed; the message names its first prompt, the server and the reason.
        """
        batches: list[list[int]] = []
        size = 0
        for index, rollout in enumerate(rollouts):
            if not batches or size + rollout.num_tokens > batch_tokens:
                batches.append([])
                size = 0
            batches[-1].append(index)
            size += rollout.num_tokens
        scores: dict[int, CompletionScores] = {}
        pool = ThreadPoolExecutor(max(1, min(len(batches), self._concurrency * len(self._servers))))
        try:
            jobs = [pool.submit(self._score, [(i, rollouts[i]) for i in batch], top_k) for batch in batches]
            for job in as_completed(jobs):
                scores.update(job.result())
                on_progress()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [scores[index] for index in range(len(rollouts))]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _score(self, batch: Sequence[tuple[int, Rollout]], top_k: int) -> dict[int, CompletionScores]:
        sequences = [np.concatenate((each.prompt_token_ids, each.response_token_ids)) for _, each in batch]
        where, reason = f"prompt {batch[0][1].prompt_id}", ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1))
            server = self._take()
            try:
                choices = self._ask(server, sequences, top_k)
                with self._lock:
                    self._alive.add(server)
                return {
                    index: _parse(choice, len(each.prompt_token_ids), ids, top_k, f"{server}, prompt {each.prompt_id}")
                    for (index, each), ids, choice in zip(batch, sequences, choices, strict=True)
                }
            except _Failed as error:
                reason = str(error)
                with self._lock:
                    self._alive.discard(server)
            except TeacherError as error:
                raise TeacherError(f"{error} ({where} and {len(batch) - 1} more)") from error
            finally:
                with self._lock:
                    self._in_flight[server] -= 1
        raise TeacherError(
            f"no teacher's server scores {where} and {len(batch) - 1} more in {self._attempts} attempts: {reason}"
        )

    def _take(self) -> str:
        """The least busy server that answers; any, if none does."""
        with self._lock:
            server = min(self._alive or self._servers, key=self._in_flight.__getitem__)
            self._in_flight[server] += 1
            return server

    def _served(self, server: str) -> dict[str, int | None]:
        try:
            found = self._call(server, "GET", "/v1/models")
            return {each["id"]: each.get("max_model_len") for each in found["data"]}
        except _Failed as error:
            raise TeacherError(str(error)) from error
        except (KeyError, TypeError) as error:
            raise TeacherError(f"the teacher's server {server} lists no models at /v1/models: check its address") from error

    def _ask(self, server: str, sequences: Sequence[TokenIds], top_k: int) -> list[Any]:
        """The `prompt_logprobs` of each sequence."""
        body = {
            "model": self._model,
            "prompt": [ids.tolist() for ids in sequences],
            "prompt_logprobs": top_k,
            "max_tokens": 1,
            "temperature": 1.0,
        }
        found = self._call(server, "POST", "/v1/completions", body)
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            lists = [choice["prompt_logprobs"] for choice in choices]
            assert [len(each) for each in lists] == [len(ids) for ids in sequences]
        except (KeyError, TypeError, AssertionError) as error:
            raise TeacherError(
                f"the teacher's server {server} did not return prompt_logprobs for every token: serve it with vLLM"
            ) from error
        return lists

    def _call(self, server: str, method: str, route: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, server + route, json=body)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _Failed(f"{server}: {' '.join(str(error).split()) or type(error).__name__}") from error
        status, text = response.status_code, response.text
        if status in (401, 403):
            raise TeacherError(f"the teacher's server {server} refuses the token: give the one that it was started with")
        if status in _TRY_AGAIN or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise _Failed(f"{server}: status {status}")
        if status != httpx.codes.OK:
            with suppress(ValueError, KeyError, TypeError):
                text = response.json()["error"]["message"]
            raise TeacherError(f"the teacher's server {server} refuses a request: {text}")
        try:
            return response.json()
        except ValueError as error:
            raise _Failed(f"{server}: an answer that is not JSON") from error


class _Failed(Exception):
    """A request that may succeed later, or on another server."""


def _parse(entries: Sequence[Any], start: int, ids: TokenIds, top_k: int, where: str) -> CompletionScores:
    """The scores of the tokens from `start` on. The sampled token is among the entries, with or without being in the top k."""
    tokens = len(ids) - start
    log_probs = np.empty(tokens, np.float32)
    top_ids, top = np.empty((tokens, top_k), np.int64), np.empty((tokens, top_k), np.float32)
    for row in range(tokens):
        found = {int(index): float(entry["logprob"]) for index, entry in (entries[start + row] or {}).items()}
        sampled = found.get(int(ids[start + row]), -np.inf)
        if not IMPOSSIBLE < sampled <= 1e-3 or len(found) < top_k:
            raise TeacherError(
                f"the teacher's server {where}: no usable scores of response token {row} (id {ids[start + row]}, "
                f"{len(found)} tokens): check that it has the student's tokens"
            )
        log_probs[row] = sampled
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        top_ids[row], top[row] = [index for index, _ in best], [value for _, value in best]
    return CompletionScores(log_probs, top_ids, top)
