"""Distribute a batch of prompts over several engine servers by the expected length of their responses, and keep every response
exactly once whatever fails.

The work is cut into assignments: one prompt with some or all of its responses, which share the prompt's KV cache. The longest
go out first, each to the server with the fewest expected tokens left. A server takes no more responses than it decodes at once;
the remaining assignments wait for a free server.
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
from kdrl_mcore.rollout.vllm.client import ServerFailed, connections
from kdrl_mcore.types import FinishReason, Prompt, Rollout, TokenFloats, TokenIds

logger = logging.getLogger(__name__)

ResponseIndex = tuple[int, int]
"""Identifies a response: (index of the prompt in the batch, number among the prompt's responses)."""
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
    """A finished response. Arrays [tokens]; they include the end of sequence if the model emitted it."""

    index: ResponseIndex
    token_ids: TokenIds
    log_probs: TokenFloats
    finish_reason: FinishReason
    version: int | None


@dataclass(frozen=True)
class Failure:
    """A server failed, and gets no more work until `Dispatch.bring_back`."""

    index: int
    reason: str


Event = Failure | BaseException | Mapping[int, Rollout] | Literal["done", "waiting"]
"""What can happen while a batch is generated: a server failed; an exception ended the generation; a part of the batch, by
index, is complete; all responses are there; nothing happened for a while."""


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

    prompt: int
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
    version: int | None
    up: bool = True
    work: dict[_Assignment, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def load(self) -> float:
        return sum(assignment.load for assignment in self.work)

    @property
    def responses(self) -> int:
        return sum(len(assignment.indices) for assignment in self.work)


class Dispatch:
    """The generation of one batch, in its own thread; `next_event` returns what happens."""

    def __init__(
        self,
        servers: Sequence[Server],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        version: int | None,
        max_sequences: int,
        lengths: ExpectedLengths,
        on_finished: Callable[[Response], None],
    ) -> None:
        """Args:
        version: the version of the servers' weights, from which every response must come.
        max_sequences: responses that one server decodes at once.
        on_finished: called in the dispatch thread, once for each response.
        """
        self._prompts, self._sampling = prompts, sampling
        self._max_sequences, self._lengths, self._on_finished = max_sequences, lengths, on_finished
        self._lanes = [_Lane(index, server, version) for index, server in enumerate(servers)]
        self._waiting = sorted(self._cut(), key=lambda each: (-each.load, each.prompt, min(each.indices)))
        self._missing = {(index, number) for index in range(len(prompts)) for number in range(sampling.responses_per_prompt)}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def announce(self, event: Event) -> None:
        """Make `next_event` return this event, unless the generation ends first."""
        self._events.put(event)

    @waits_for_others
    def next_event(self, seconds: float) -> Event:
        """The next event: a server's failure (the others continue), an announced event, the exception that ended the
        generation, "done" after the last response, or "waiting" if nothing happened within `seconds`."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return "waiting"

    def bring_back(self, index: int, version: int | None) -> None:
        """Give work again to a server that failed and now has weights of this version. The others may have finished by then."""

        def give() -> None:
            self._lanes[index].version, self._lanes[index].up = version, True
            self._changed.set()

        self._soon(give)

    def stop(self) -> None:
        """End the generation, finished or not, and its thread."""

        def cancel() -> None:
            if self._main is not None:
                self._main.cancel()

        self._soon(cancel)
        if self._thread.ident is not None:
            self._thread.join()

    def _soon(self, action: Callable[[], None]) -> None:
        """Run an action in the dispatch thread, unless the generation has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action)

    def _cut(self) -> list[_Assignment]:
        responses = self._sampling.responses_per_prompt
        fair = len(self._prompts) * responses // (_ASSIGNMENTS_PER_SERVER * len(self._lanes))
        size = max(1, min(responses, fair, self._max_sequences))
        return [
            _Assignment(
                index,
                set(range(begin, min(begin + size, responses))),
                self._lengths.of(prompt.prompt_id, self._sampling.max_response_tokens),
            )
            for index, prompt in enumerate(self._prompts)
            for begin in range(0, responses, size)
        ]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._generate())
                self._events.put("done")
            except asyncio.CancelledError:
                return
            except BaseException as error:  # `next_event` returns it to the other thread
                self._events.put(error)

    async def _generate(self) -> None:
        self._main = asyncio.current_task()
        async with connections() as http:
            try:
                while self._missing:
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
            task = lane.work[assignment] = asyncio.create_task(self._work(http, lane, assignment))
            # A callback runs even if the task is cancelled before it begins.
            task.add_done_callback(partial(self._put_back, lane, assignment))

    def _has_capacity(self, lane: _Lane, assignment: _Assignment) -> bool:
        return not lane.work or lane.responses + len(assignment.indices) <= self._max_sequences

    async def _work(self, http: httpx.AsyncClient, lane: _Lane, assignment: _Assignment) -> None:
        requests = [self._request(assignment.prompt, number) for number in sorted(assignment.indices)]
        sampling = self._sampling
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_response_tokens,
        }
        try:
            async for line in lane.server.generate(http, lane.version, requests, settings):
                self._take(lane, assignment, line)
        except ServerFailed as error:
            self._fail(lane, str(error))
        except asyncio.CancelledError:
            pass
        except Exception as error:  # `_generate` raises it and ends
            self._error = error

    def _put_back(self, lane: _Lane, assignment: _Assignment, _: asyncio.Task[None]) -> None:
        del lane.work[assignment]
        if assignment.indices:
            self._waiting.insert(0, assignment)
        self._changed.set()

    def _request(self, index: int, number: int) -> dict[str, Any]:
        return {
            "id": f"{index}.{number}",
            "prompt_token_ids": self._prompts[index].token_ids.tolist(),
            "seed": request_seed(self._sampling.key, index, number),
        }

    def _take(self, lane: _Lane, assignment: _Assignment, line: Mapping[str, Any]) -> None:
        """Keep a response unless it has arrived before."""
        index, number = map(int, line["id"].split("."))
        if line["version"] != lane.version:
            raise ServerFailed(f"response {line['id']} comes from weight version {line['version']}, not {lane.version}")
        if line["finish_reason"] not in ("stop", "length") or not line["token_ids"]:
            raise ServerFailed(
                f"response {line['id']} ended with {line['finish_reason']!r} and {len(line['token_ids'])} tokens"
            )
        assignment.indices.discard(number)
        if (index, number) not in self._missing:
            return
        self._missing.remove((index, number))
        self._lengths.add(self._prompts[index].prompt_id, len(line["token_ids"]))
        token_ids = np.array(line["token_ids"], dtype=np.int64)
        log_probs = np.array(line["log_probs"], dtype=np.float32)
        self._on_finished(Response((index, number), token_ids, log_probs, line["finish_reason"], line["version"]))

    def _fail(self, lane: _Lane, reason: str) -> None:
        """Take a server out of use; its work waits for another one."""
        if not lane.up:
            return
        lane.up = False
        this = asyncio.current_task()
        for task in lane.work.values():
            if task is not this:
                task.cancel()
        self._events.put(Failure(lane.index, reason))


def request_seed(key: tuple[int, ...], index: int, number: int) -> int:
    """The seed of one response: a function of the call and the response's index, independent of the server and of restarts."""
    high, low = np.random.SeedSequence([*key, index, number]).generate_state(2, np.uint32).tolist()
    return (high << 31) ^ low  # below 2**63
