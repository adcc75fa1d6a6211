"""Shares one batch of prompts among several engine servers, by the length of answers to expect, and keeps every response
exactly once, whatever fails on the way.

Work is cut into pieces: one prompt with some or all of its copies, which share the prompt's KV cache. The longest pieces go
first, each to the server with the fewest tokens still to come; a server takes no more responses than it decodes at once, so
that the rest waits for whoever has room.
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
from typing import Any, Protocol

import httpx
import numpy as np

from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.vllm_client import ServerFailed, connections
from kdrl_mcore.types import FinishReason, Prompt, TokenFloats, TokenIds

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""Which response: (place of the prompt in the batch, copy)."""
_PIECES_PER_SERVER = 4  # at least, as long as a prompt has copies to spread


class Server(Protocol):
    """What is needed of an `EngineServer`."""

    def generate(
        self,
        http: httpx.AsyncClient,
        version: int | None,
        requests: Sequence[Mapping[str, Any]],
        sampling: Mapping[str, Any],
    ) -> AsyncIterator[dict[str, Any]]:
        """Responses as they end."""
        ...


@dataclass(frozen=True)
class Response:
    """A finished response. Arrays [tokens]; the end of sequence is in it where it ended by itself."""

    place: Place
    token_ids: TokenIds
    log_probs: TokenFloats
    finish_reason: FinishReason
    version: int | None


@dataclass(frozen=True)
class Failure:
    """A server that failed, and takes no more work until `Dispatch.bring_back`."""

    index: int
    reason: str


class ExpectedLengths:
    """How long answers have been: the mean of each prompt's responses so far, else of all prompts' so far, else the limit."""

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
        """Tokens to expect of one response."""
        tokens, responses = self._of_prompt.get(prompt_id, (self._tokens, self._responses))
        return min(tokens / responses, limit) if responses else float(limit)


@dataclass(eq=False)
class _Piece:
    """One prompt and those of its copies that are still to come."""

    prompt: int
    copies: set[int]
    expected: float  # tokens of one response

    @property
    def load(self) -> float:
        return len(self.copies) * self.expected


@dataclass(eq=False)
class _Lane:
    """One server and what it works on."""

    index: int
    server: Server
    version: int | None
    up: bool = True
    work: dict[_Piece, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def load(self) -> float:
        return sum(piece.load for piece in self.work)

    @property
    def responses(self) -> int:
        return sum(len(piece.copies) for piece in self.work)


class Dispatch:
    """The generation of one batch, in a thread of its own; `next_event` tells what happens."""

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
        version: of the servers' weights; every response must come from those.
        max_sequences: responses that one server decodes at once.
        on_finished: called in the dispatch's thread, once for each response.
        """
        self._prompts, self._sampling = prompts, sampling
        self._max_sequences, self._lengths, self._on_finished = max_sequences, lengths, on_finished
        self._lanes = [_Lane(index, server, version) for index, server in enumerate(servers)]
        self._waiting = sorted(self._cut(), key=lambda piece: (-piece.load, piece.prompt, min(piece.copies)))
        self._missing = {(place, copy) for place in range(len(prompts)) for copy in range(sampling.copies)}
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def announce(self, event: Any) -> None:
        """Have `next_event` tell it, unless the generation ends before."""
        self._events.put(event)

    def next_event(self, seconds: float) -> Any:
        """What happened next: a server's failure (the others go on), what was announced, what ended the generation, "done"
        after the last response, or "waiting" when nothing happened within `seconds`."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return "waiting"
        return "done" if event is None else event

    def bring_back(self, index: int, version: int | None) -> None:
        """Give work again to a server that failed; it has weights of this version now. The others may have done it all."""

        def give() -> None:
            self._lanes[index].version, self._lanes[index].up = version, True
            self._changed.set()

        self._soon(give)

    def stop(self) -> None:
        """End the generation, finished or not, and the thread."""

        def cancel() -> None:
            if self._main is not None:
                self._main.cancel()

        self._soon(cancel)
        if self._thread.ident is not None:
            self._thread.join()

    def _soon(self, action: Callable[[], None]) -> None:
        """Run it in the dispatch's thread, unless the generation has ended by itself."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action)

    def _cut(self) -> list[_Piece]:
        copies = self._sampling.copies
        fair = len(self._prompts) * copies // (_PIECES_PER_SERVER * len(self._lanes))
        size = max(1, min(copies, fair, self._max_sequences))
        return [
            _Piece(
                place,
                set(range(begin, min(begin + size, copies))),
                self._lengths.of(prompt.prompt_id, self._sampling.max_response_tokens),
            )
            for place, prompt in enumerate(self._prompts)
            for begin in range(0, copies, size)
        ]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._generate())
                self._events.put(None)
            except asyncio.CancelledError:
                return
            except BaseException as error:  # goes on in the thread that asks for events
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
            piece = self._waiting[0]
            free = [lane for lane in self._lanes if lane.up and self._has_room(lane, piece)]
            if not free:
                return
            lane = min(free, key=lambda each: each.load)
            del self._waiting[0]
            task = lane.work[piece] = asyncio.create_task(self._work(http, lane, piece))
            task.add_done_callback(partial(self._put_back, lane, piece))  # runs too if the task is cancelled before it begins

    def _has_room(self, lane: _Lane, piece: _Piece) -> bool:
        return not lane.work or lane.responses + len(piece.copies) <= self._max_sequences

    async def _work(self, http: httpx.AsyncClient, lane: _Lane, piece: _Piece) -> None:
        requests = [self._request(piece.prompt, copy) for copy in sorted(piece.copies)]
        sampling = self._sampling
        how = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_response_tokens,
        }
        try:
            async for line in lane.server.generate(http, lane.version, requests, how):
                self._take(lane, piece, line)
        except ServerFailed as error:
            self._fail(lane, str(error))
        except asyncio.CancelledError:
            pass
        except Exception as error:  # ends the generation, in `_generate`
            self._error = error

    def _put_back(self, lane: _Lane, piece: _Piece, _: asyncio.Task[None]) -> None:
        del lane.work[piece]
        if piece.copies:
            self._waiting.insert(0, piece)
        self._changed.set()

    def _request(self, place: int, copy: int) -> dict[str, Any]:
        return {
            "id": f"{place}.{copy}",
            "prompt_token_ids": self._prompts[place].token_ids.tolist(),
            "seed": request_seed(self._sampling.key, place, copy),
        }

    def _take(self, lane: _Lane, piece: _Piece, line: Mapping[str, Any]) -> None:
        """Keep a response, the first time it comes."""
        place, copy = map(int, line["id"].split("."))
        if line["version"] != lane.version:
            raise ServerFailed(f"response {line['id']} comes from weight version {line['version']}, not {lane.version}")
        if line["finish_reason"] not in ("stop", "length") or not line["token_ids"]:
            raise ServerFailed(f"response {line['id']} ended by {line['finish_reason']!r} with {len(line['token_ids'])} tokens")
        piece.copies.discard(copy)
        if (place, copy) not in self._missing:
            return
        self._missing.remove((place, copy))
        self._lengths.add(self._prompts[place].prompt_id, len(line["token_ids"]))
        token_ids = np.array(line["token_ids"], dtype=np.int64)
        log_probs = np.array(line["log_probs"], dtype=np.float32)
        self._on_finished(Response((place, copy), token_ids, log_probs, line["finish_reason"], line["version"]))

    def _fail(self, lane: _Lane, reason: str) -> None:
        """Take a server out; what it worked on waits for another one."""
        if not lane.up:
            return
        lane.up = False
        this = asyncio.current_task()
        for task in lane.work.values():
            if task is not this:
                task.cancel()
        self._events.put(Failure(lane.index, reason))


def request_seed(key: tuple[int, ...], place: int, copy: int) -> int:
    """The seed of one response: a function of the call and its place, not of the server or of how often it was begun."""
    high, low = np.random.SeedSequence([*key, place, copy]).generate_state(2, np.uint32).tolist()
    return (high << 31) ^ low  # below 2**63
