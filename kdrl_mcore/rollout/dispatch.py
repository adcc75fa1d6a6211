"""Distribute prompts over several engine servers by the expected length of their responses, and keep every response exactly
once, whatever fails.

The work is cut into assignments: one prompt with some or all of its responses, which share the prompt's KV cache. Of prompts
that were submitted together, the longest are sent first, each to the server with the fewest expected tokens left. A server
is sent no more responses than it decodes at once; the remaining assignments wait for a free server.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import httpx
import numpy as np

from kdrl_mcore.resilience.waiting import waits_for_others
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.experts import decode
from kdrl_mcore.rollout.vllm.client import ServerFailed, connections
from kdrl_mcore.types import ExpertIds, FinishReason, Prompt, Rollout, TokenFloats, TokenIds

logger = logging.getLogger(__name__)

ResponseIndex = tuple[int, int]
"""Identifies a response: (ticket of the prompt, number among the prompt's responses)."""
Versions = tuple[tuple[int, int], ...]
"""The versions of the weights that sampled a response, in order: (version, tokens)."""
_ASSIGNMENTS_PER_SERVER = 4  # at least, unless prompts have too few responses to split


class Server(Protocol):
    """The part of an `EngineServer` that generation needs."""

    def generate(
        self,
        http: httpx.AsyncClient,
        version: int | None,
        requests: Sequence[Mapping[str, Any]],
        sampling: Mapping[str, Any],
    ) -> AsyncIterator[dict[str, Any]]:
        """Responses as they finish."""
        ...


@dataclass(frozen=True)
class Response:
    """A finished response. Arrays [tokens]; they include the end of sequence if the model emitted it. `experts` are those of
    the prompt and the response but its last token, of all layers; None unless they were asked for."""

    index: ResponseIndex
    token_ids: TokenIds
    log_probs: TokenFloats
    finish_reason: FinishReason
    versions: Versions
    experts: ExpertIds | None = None


@dataclass(frozen=True)
class Submitted:
    """A prompt whose responses are to be sampled.

    Attributes:
        ticket: identifies it; never used twice.
        index: its number among the prompts of its draw; with the sampling's key it determines the seeds of the responses.
        begun: the number of the prompt's tokens, from its end, that belong to a response which is continued.
    """

    ticket: int
    prompt: Prompt
    index: int
    sampling: Sampling
    begun: int = 0


@dataclass(frozen=True)
class Failure:
    """A server failed, and gets no more work until `Dispatch.bring_back`. `life` is how many times it had been brought back."""

    index: int
    reason: str
    life: int = 0


@dataclass(frozen=True)
class Complete:
    """All responses to a prompt, in order."""

    ticket: int
    rollouts: list[Rollout]


Event = Failure | BaseException | Complete | Literal["waiting"]
"""The events of sampling: a server failed; an exception ended the sampling; a group is complete; nothing happened for a
while."""


class ExpectedLengths:
    """Expected response lengths: the mean over the prompt's own responses so far, else over all responses, else the limit."""

    def __init__(self) -> None:
        self._of_prompt: dict[str, tuple[int, int]] = {}  # (tokens, responses)
        self._tokens = self._responses = 0

    def add(self, prompt_id: str, tokens: int) -> None:
        """Count one response."""
        before = self._of_prompt.get(prompt_id, (0, 0))
        self._of_prompt[prompt_id] = (before[0] + tokens, before[1] + 1)
        self._tokens += tokens
        self._responses += 1

    def of(self, prompt_id: str, limit: int) -> float:
        """The expected tokens of one response."""
        tokens, responses = self._of_prompt.get(prompt_id, (self._tokens, self._responses))
        return min(tokens / responses, limit) if responses else float(limit)


@dataclass(eq=False)
class _Assignment:
    """One prompt and those of its responses that are still missing."""

    prompt: Submitted
    indices: set[int]
    expected: float  # tokens per response

    @property
    def load(self) -> float:
        return len(self.indices) * self.expected


@dataclass(eq=False)
class _Lane:
    """One server and its current work."""

    index: int
    server: Server
    version: int
    up: bool = True
    life: int = 0
    work: dict[_Assignment, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def load(self) -> float:
        return sum(assignment.load for assignment in self.work)

    @property
    def responses(self) -> int:
        return sum(len(assignment.indices) for assignment in self.work)


class Dispatch:
    """The sampling of responses, in its own thread. Prompts are submitted at any time; `next_event` returns what happens."""

    def __init__(
        self,
        servers: Sequence[Server],
        version: int,
        max_sequences: int,
        lengths: ExpectedLengths,
        on_finished: Callable[[Response], None],
    ) -> None:
        """Args:
        version: the version of the servers' weights. Every token must come from this version, or from one that `expect`
            announced after the response was begun.
        max_sequences: responses that one server decodes at once.
        on_finished: called in the dispatch thread, once for each response.
        """
        self._max_sequences, self._lengths, self._on_finished = max_sequences, lengths, on_finished
        self._lanes = [_Lane(index, server, version) for index, server in enumerate(servers)]
        self._newest = version
        self._waiting: list[_Assignment] = []
        self._missing: set[ResponseIndex] = set()
        self._lives = [0] * len(servers)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, prompts: Sequence[Submitted]) -> None:
        """Sample the responses to these prompts, after those that were submitted before."""
        assignments = sorted(self._cut(prompts), key=lambda each: (-each.load, each.prompt.ticket, min(each.indices)))

        def add() -> None:
            self._missing |= {(each.prompt.ticket, number) for each in assignments for number in each.indices}
            self._waiting += assignments
            self._changed.set()

        self._soon(add)

    def announce(self, event: Event) -> None:
        """Make `next_event` return this event."""
        self._events.put(event)

    @waits_for_others
    def next_event(self, seconds: float) -> Event:
        """The next event: a server's failure (the others continue), an announced event, the exception that ended the
        sampling, or "waiting" if nothing happened within `seconds`."""
        while True:
            try:
                event = self._events.get(timeout=seconds)
            except queue.Empty:
                return "waiting"
            if not isinstance(event, Failure) or event.life == self._lives[event.index]:  # else it was brought back
                return event

    def expect(self, version: int) -> None:
        """Servers will get weights of this version, and responses may continue with them."""
        self._newest = max(self._newest, version)

    def renew(self, version: int) -> None:
        """All working servers now have weights of this version."""

        def set_version() -> None:
            for lane in self._lanes:
                if lane.up:
                    lane.version = version

        self.expect(version)
        self._soon(set_version)

    def bring_back(self, index: int, version: int) -> None:
        """Give work again to a server that failed and now has weights of this version. The others may have finished by then."""
        self._lives[index] += 1
        life = self._lives[index]

        def give() -> None:
            lane = self._lanes[index]
            for task in lane.work.values():  # of the earlier process
                task.cancel()
            lane.version, lane.up, lane.life = version, True, life
            self._changed.set()

        self.expect(version)
        self._soon(give)

    def stop(self) -> None:
        """End the sampling, finished or not, and its thread."""

        def cancel() -> None:
            if self._main is not None:
                self._main.cancel()

        self._soon(cancel)
        if self._thread.ident is not None:
            self._thread.join()

    def _soon(self, action: Callable[[], None]) -> None:
        """Run an action in the dispatch thread, unless the sampling has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action)

    def _cut(self, prompts: Sequence[Submitted]) -> list[_Assignment]:
        fair = sum(each.sampling.responses_per_prompt for each in prompts) // (_ASSIGNMENTS_PER_SERVER * len(self._lanes))
        assignments = []
        for each in prompts:
            responses, limit = each.sampling.responses_per_prompt, each.sampling.max_response_tokens
            size, expected = max(1, min(responses, fair, self._max_sequences)), self._lengths.of(each.prompt.prompt_id, limit)
            for begin in range(0, responses, size):
                assignments.append(_Assignment(each, set(range(begin, min(begin + size, responses))), expected))
        return assignments

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._sample())
            except asyncio.CancelledError:
                return
            except BaseException as error:  # `next_event` returns it to the other thread
                self._events.put(error)

    async def _sample(self) -> None:
        self._main = asyncio.current_task()
        async with connections() as http:
            try:
                while True:
                    self._hand_out(http)
                    await self._changed.wait()
                    self._changed.clear()
                    if self._error is not None:
                        raise self._error
            finally:
                tasks = [task for lane in self._lanes for task in lane.work.values()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _hand_out(self, http: httpx.AsyncClient) -> None:
        while self._waiting:
            assignment = self._waiting[0]
            free = [lane for lane in self._lanes if lane.up and self._has_capacity(lane, assignment)]
            if not free:
                return
            lane = min(free, key=lambda each: each.load)
            del self._waiting[0]
            task = lane.work[assignment] = asyncio.create_task(self._work(http, lane, assignment, lane.version))
            # A callback runs even if the task is cancelled before it begins.
            task.add_done_callback(partial(self._put_back, lane, assignment))

    def _has_capacity(self, lane: _Lane, assignment: _Assignment) -> bool:
        return not lane.work or lane.responses + len(assignment.indices) <= self._max_sequences

    async def _work(self, http: httpx.AsyncClient, lane: _Lane, assignment: _Assignment, version: int) -> None:
        requests = [self._request(assignment.prompt, number) for number in sorted(assignment.indices)]
        sampling = assignment.prompt.sampling
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop": sampling.stop,
            "experts": sampling.experts,
            "max_tokens": sampling.max_response_tokens,
        }
        try:
            async for line in lane.server.generate(http, version, requests, settings):
                self._take(assignment, line, version)
        except ServerFailed as error:
            self._fail(lane, str(error))
        except asyncio.CancelledError:
            pass
        except Exception as error:  # `_sample` raises it and ends
            self._error = error

    def _put_back(self, lane: _Lane, assignment: _Assignment, _: asyncio.Task[None]) -> None:
        del lane.work[assignment]
        if assignment.indices:
            self._waiting.insert(0, assignment)
        self._changed.set()

    def _request(self, submitted: Submitted, number: int) -> dict[str, Any]:
        return {
            "id": f"{submitted.ticket}.{number}",
            "prompt_token_ids": submitted.prompt.token_ids.tolist(),
            "begun": submitted.begun,
            "seed": request_seed(submitted.sampling.key, submitted.index, number),
        }

    def _take(self, assignment: _Assignment, line: Mapping[str, Any], asked: int) -> None:
        """Keep a response unless it has arrived before.

        Args:
            asked: the version of the weights that the request named.
        """
        ticket, number = map(int, line["id"].split("."))
        versions: Versions = tuple((version, count) for version, count in line["versions"])
        if line["finish_reason"] not in ("stop", "length") or not line["token_ids"]:
            raise ServerFailed(
                f"response {line['id']} ended with {line['finish_reason']!r} and {len(line['token_ids'])} tokens"
            )
        if not _is_order_of(versions, asked, self._newest) or sum(count for _, count in versions) != len(line["token_ids"]):
            raise ServerFailed(
                f"response {line['id']} comes from weight versions {_listed(versions)}, asked for {asked} to {self._newest}"
            )
        assignment.indices.discard(number)
        if (ticket, number) not in self._missing:
            return
        self._missing.remove((ticket, number))
        self._lengths.add(assignment.prompt.prompt.prompt_id, len(line["token_ids"]))
        token_ids = np.array(line["token_ids"], dtype=np.int64)
        log_probs = np.array(line["log_probs"], dtype=np.float32)
        experts = None if line.get("experts") is None else decode(line["experts"])
        self._on_finished(Response((ticket, number), token_ids, log_probs, line["finish_reason"], versions, experts))

    def _fail(self, lane: _Lane, reason: str) -> None:
        """Take a server out of use; its work waits for another one."""
        if not lane.up:
            return
        lane.up = False
        this = asyncio.current_task()
        for task in lane.work.values():
            if task is not this:
                task.cancel()
        self._events.put(Failure(lane.index, reason, lane.life))


def _is_order_of(versions: Versions, oldest: int, newest: int) -> bool:
    """Whether the versions are ascending and lie between `oldest` and `newest`."""
    named = [version for version, _ in versions]
    return None not in named and named == sorted(set(named)) and bool(named) and oldest <= named[0] and named[-1] <= newest


def _listed(versions: Versions) -> str:
    return ", ".join(f"{version} ({count} tokens)" for version, count in versions) or "none"


def request_seed(key: tuple[int, ...], index: int, number: int) -> int:
    """The seed of one response: a function of the call and the response's index, independent of the server and of restarts."""
    high, low = np.random.SeedSequence([*key, index, number]).generate_state(2, np.uint32).tolist()
    return (high << 31) ^ low  # below 2**63
