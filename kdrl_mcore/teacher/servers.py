"""Servers of one and the same teacher, which share the requests of a client: requests in parallel, retries, time-outs, tokens.

What a request asks for is the subject of the subclasses: `completions.py` and `state_servers.py`.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from torch import Tensor

from kdrl_mcore.errors import TeacherError
from kdrl_mcore.types import Rollout, TokenFloats, TokenIds

FIRST_WAIT_SECONDS = 0.5
"""The wait before the second attempt of a request; it doubles with each further attempt, and up to half of it is random."""
HEALTH_SECONDS = 5.0
"""How long a server that was left out may take to say that it is well."""
POLL_SECONDS = 1.0
"""The time between two looks at servers that are still starting."""
FINGERPRINT = "fingerprint:"
"""The prefix of a name under which a server of `kdrl-serve-teacher` also serves its model: the fingerprint of its weights."""
_TRY_AGAIN = (408, 425, 429)

Addresses = Callable[[], Mapping[str, str | None]]
"""The servers' base URLs, such as `http://127.0.0.1:8000`, with their bearer tokens. Called again after a failure, because a
server that was started again has another address."""


@dataclass(frozen=True)
class ServedScores:
    """The scores of one response.

    Attributes:
        log_probs: log T of its tokens [T]; None where a server gives only states.
        states: what the student's stand-in for the teacher's head, or the head itself, reads [T, G]; None if not asked for.
        entropies: those of T [T]; None if not asked for.
    """

    log_probs: TokenFloats | None
    states: Tensor | None = None
    entropies: TokenFloats | None = None


@dataclass(frozen=True)
class Expected:
    """What servers must have to be the run's teacher.

    Attributes:
        probe: token ids that the servers score.
        texts: the text of each of them; empty where a token is no whole text, or its text is not known.
        longest: the most tokens of a prompt and a response.
        fingerprint: that of the teacher's weights; None if it is not known.
    """

    probe: TokenIds
    texts: Sequence[str]
    longest: int
    fingerprint: str | None = None


class Failed(Exception):
    """A request that may succeed later, or on another server."""


class ScoringServers(ABC):
    """Servers of one teacher. One that fails is left out while another answers, until it is well at the next `score`."""

    def __init__(
        self,
        addresses: Addresses,
        *,
        concurrency: int = 16,
        attempts: int = 5,
        timeout: float = 300.0,
        batch_tokens: int = 16384,
    ) -> None:
        """Args:
        concurrency: requests in flight per server.
        attempts: tries of one request, on any servers.
        timeout: seconds without an answer to one request.
        batch_tokens: the most tokens of a request with several responses.
        """
        self._find, self._tokens = addresses, dict(addresses())
        self._in_flight = dict.fromkeys(self._tokens, 0)
        self._alive = set(self._tokens)
        self._lock = threading.Lock()
        self._concurrency, self._attempts, self._batch_tokens = concurrency, attempts, batch_tokens
        self._http = httpx.Client(timeout=timeout, trust_env=False, limits=httpx.Limits(max_connections=None))
        self._closed = threading.Event()

    @abstractmethod
    def check(self, expected: Expected) -> str:
        """Check that every server serves one and the same model, has the student's tokens, and answers what will be asked.

        Returns:
            A description of the model.

        Raises:
            TeacherError: naming the server and what to change.
        """

    @abstractmethod
    def _scores(self, server: str, batch: Sequence[Rollout], wanted: frozenset[str]) -> list[ServedScores]:
        """The scores of some responses, from one request, which may be more than is wanted.

        Raises:
            Failed: another attempt may succeed.
            TeacherError: none will.
        """

    def wait(self, seconds: float, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait until every server answers at all.

        Raises:
            TeacherError: one did not in this time.
        """
        deadline = time.monotonic() + seconds
        for server in self._tokens:
            while True:
                try:
                    self._call(server, "GET", "/health")
                    break
                except Failed as error:
                    if time.monotonic() > deadline:
                        raise TeacherError(
                            f"the teacher's server {error}: start it, or wait longer (server.startup_timeout={seconds:g})"
                        ) from error
                on_wait()
                time.sleep(POLL_SECONDS)

    def score(
        self, rollouts: Sequence[Rollout], wanted: frozenset[str], on_progress: Callable[[], None] = lambda: None
    ) -> list[ServedScores]:
        """The scores of each rollout, all or none.

        Args:
            wanted: those of `config.derived.wanted_scores`; the answers may have more.
            on_progress: called after each answer.

        Raises:
            TeacherError: a request failed; the message names its first prompt, the server and the reason.
        """
        batches: list[list[int]] = []
        size = 0
        for index, rollout in enumerate(rollouts):
            if not batches or size + rollout.num_tokens > self._batch_tokens:
                batches.append([])
                size = 0
            batches[-1].append(index)
            size += rollout.num_tokens
        self._look_again()
        scores: dict[int, ServedScores] = {}
        pool = ThreadPoolExecutor(max(1, min(len(batches), self._concurrency * len(self._tokens))))
        try:
            jobs = {pool.submit(self._score, [rollouts[i] for i in batch], wanted): batch for batch in batches}
            for job in as_completed(jobs):
                scores |= zip(jobs[job], job.result(), strict=True)
                on_progress()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [scores[index] for index in range(len(rollouts))]

    def _look_again(self) -> None:
        """Ask the servers that were left out whether they answer again."""
        for server in self._tokens.keys() - self._alive:
            with suppress(Failed, TeacherError):
                self._call(server, "GET", "/health", timeout=HEALTH_SECONDS)
                with self._lock:
                    self._alive.add(server)

    def close(self) -> None:
        """Close the connections. Requests under way fail, and are not tried again."""
        self._closed.set()
        self._http.close()

    def _score(self, batch: Sequence[Rollout], wanted: frozenset[str]) -> list[ServedScores]:
        where, reason = f"prompt {batch[0].prompt_id} and {len(batch) - 1} more", ""
        for attempt in range(self._attempts):
            if attempt and self._closed.wait(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1)):
                break
            server = self._take()
            try:
                scores = self._scores(server, batch, wanted)
                with self._lock:
                    self._alive.add(server)
                return scores
            except Failed as error:
                reason = str(error)
                self._leave_out(server)
            except TeacherError as error:
                raise TeacherError(f"{error} ({where})") from error
            finally:
                with self._lock:
                    self._in_flight[server] -= 1
        raise TeacherError(f"no teacher's server scores {where} in {self._attempts} attempts: {reason}")

    def _take(self) -> str:
        """The least busy server that answers; any, if none does."""
        with self._lock:
            server = min(self._alive or self._tokens, key=self._in_flight.__getitem__)
            self._in_flight[server] += 1
            return server

    def _leave_out(self, server: str) -> None:
        """Leave out a server that failed, and look for servers that were started again."""
        with suppress(TeacherError, OSError):
            found = self._find()
            with self._lock:
                self._alive |= found.keys() - self._tokens.keys()
                self._in_flight = dict.fromkeys(found, 0) | self._in_flight
                self._tokens = {**self._tokens, **found}
        with self._lock:
            self._alive.discard(server)

    def _get(self, server: str, route: str) -> Any:
        """A JSON answer that a server must give.

        Raises:
            TeacherError: it does not.
        """
        try:
            return json_of(server, self._call(server, "GET", route))
        except Failed as error:
            raise TeacherError(f"the teacher's server {error}") from error

    def _call(self, server: str, method: str, route: str, **body: Any) -> httpx.Response:
        """An answer with status 200.

        Args:
            body: further arguments of `httpx.Client.request`.

        Raises:
            Failed: the server cannot be reached, or has failed.
            TeacherError: it refuses the request.
        """
        token = self._tokens[server]
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            response = self._http.request(method, server + route, headers=headers, **body)
        except (httpx.RequestError, httpx.InvalidURL, RuntimeError) as error:  # the last: the client was closed
            raise Failed(f"{server}: {' '.join(str(error).split()) or type(error).__name__}") from error
        status, text = response.status_code, response.text if response.status_code != httpx.codes.OK else ""
        if status in (401, 403):
            raise TeacherError(f"the teacher's server {server} refuses the token: give the one that it was started with")
        if status in _TRY_AGAIN or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise Failed(f"{server}: status {status}")
        if status != httpx.codes.OK:
            with suppress(ValueError, KeyError, TypeError):
                text = response.json()["error"]["message"]
            raise TeacherError(f"the teacher's server {server} refuses a request: {' '.join(text.split())[:500]}")
        return response


def json_of(server: str, response: httpx.Response) -> Any:
    """The content of an answer.

    Raises:
        Failed: it is not JSON.
    """
    try:
        return response.json()
    except ValueError as error:
        raise Failed(f"{server}: an answer that is not JSON") from error


def check_fingerprint(server: str, found: str | None, expected: str | None) -> None:
    """Check the fingerprint of a server's weights, if both are known.

    Raises:
        TeacherError: they differ.
    """
    if found is not None and expected is not None and not expected.startswith(found):
        raise TeacherError(
            f"the teacher's server {server} serves another model (fingerprint {found}) than the teacher's path names "
            f"({expected[: len(found)]}): change one of them"
        )


def check_texts(server: str, expected: Expected, texts: Sequence[str | None]) -> None:
    """Check the texts that a server gives for the tokens of the probe, or the first of them; None or empty where it gives none.

    Raises:
        TeacherError: one is another token there.
    """
    for index, theirs in enumerate(texts):
        ours = expected.texts[index]
        if ours.strip() and theirs and theirs.strip() != ours.strip():
            raise TeacherError(
                f"the teacher's server {server} has another tokenizer: token {expected.probe[index]} is {theirs!r} there and "
                f"{ours!r} here"
            )
