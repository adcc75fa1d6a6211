"""Prompts are shared among servers by expected length, and every response comes exactly once, whatever fails."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.errors import EngineError
from kdrl_mcore.resilience.watchdog import _waits
from kdrl_mcore.rollout.dispatch import Complete, Dispatch, ExpectedLengths, Failure, Response, Submitted, request_seed
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.vllm.client import ServerFailed
from kdrl_mcore.types import Prompt

TOKEN_SECONDS = 1e-4


@dataclass
class FakeServer:
    """Decodes all its requests at once, a token per TOKEN_SECONDS; the seed determines the tokens of a response.

    `fails_after`: the number of responses until the server fails with all its unfinished ones. `length`: the length of a
    response, by prompt and seed.
    """

    length: Callable[[list[int], int], int] = lambda prompt, seed: 1 + seed % 50
    fails_after: int | None = None
    error: Exception = field(default_factory=lambda: ServerFailed("killed"))
    begun: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    tokens: int = 0
    at_once: int = 0
    most_at_once: int = 0
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: line

    async def generate(
        self, http: Any, version: int | None, requests: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        self.begun += [each["id"] for each in requests]
        self.at_once += len(requests)
        self.most_at_once = max(self.most_at_once, self.at_once)
        left = len(requests)
        try:
            spent = 0
            for each in sorted(requests, key=lambda each: self.length(each["prompt_token_ids"], each["seed"])):
                length = self.length(each["prompt_token_ids"], each["seed"])
                await asyncio.sleep((length - spent) * TOKEN_SECONDS)
                spent = length
                if self.fails_after is not None and len(self.finished) >= self.fails_after:
                    raise self.error
                self.finished.append(each["id"])
                self.tokens += length
                ids = [each["seed"] % 1000, *range(1, length)]
                left -= 1
                self.at_once -= 1
                line = {"id": each["id"], "token_ids": ids, "log_probs": [-1.0] * length, "finish_reason": "stop"}
                yield self.change({**line, "versions": [[version, length]]})
        finally:
            self.at_once -= left


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "", np.array([i + 1, 2, 3]), "") for i in range(count)]


def sampling_of(responses_per_prompt: int) -> Sampling:
    return Sampling(
        temperature=1.0, top_p=1.0, max_response_tokens=50, responses_per_prompt=responses_per_prompt, key=(1, 0, 7)
    )


def submitted(prompts: Sequence[Prompt], responses_per_prompt: int, first: int = 0) -> list[Submitted]:
    sampling = sampling_of(responses_per_prompt)
    return [Submitted(first + index, prompt, index, sampling) for index, prompt in enumerate(prompts)]


def run(
    servers: Sequence[FakeServer],
    prompts: Sequence[Prompt],
    responses_per_prompt: int = 4,
    max_sequences: int = 256,
    lengths: ExpectedLengths | None = None,
    on_failure: Callable[[Failure], bool] = lambda failure: True,
) -> tuple[dict[tuple[int, int], Response], list[Failure]]:
    """All responses by index, and the failures. `on_failure` says whether the server comes back."""
    got: list[Response] = []
    failures: list[Failure] = []

    def keep(response: Response) -> None:
        got.append(response)
        if len(got) == len(prompts) * responses_per_prompt:
            dispatch.announce(Complete(0, []))

    dispatch = Dispatch(servers, 3, max_sequences, lengths or ExpectedLengths(), keep)
    dispatch.start()
    dispatch.submit(submitted(prompts, responses_per_prompt))
    try:
        while True:
            event = dispatch.next_event(20.0)
            if isinstance(event, Complete):
                break
            if isinstance(event, Failure):
                failures.append(event)
                if on_failure(event):
                    dispatch.bring_back(event.index, 3)
                continue
            if isinstance(event, BaseException):
                raise event
            raise TimeoutError("the dispatch hangs")
    finally:
        dispatch.stop()
    assert Counter(response.index for response in got).most_common(1)[0][1] == 1  # none came twice
    return {response.index: response for response in got}, failures


def everything(prompts: int, responses_per_prompt: int) -> set[tuple[int, int]]:
    return {(index, response) for index in range(prompts) for response in range(responses_per_prompt)}


def test_every_response_comes_once_and_no_server_is_idle() -> None:
    servers = [FakeServer(), FakeServer(), FakeServer()]
    got, failures = run(servers, prompts_of(10), max_sequences=8)
    assert set(got) == everything(10, 4) and not failures
    assert all(server.finished for server in servers)
    assert max(server.most_at_once for server in servers) <= 8


def test_a_servers_failure_costs_and_doubles_nothing() -> None:
    def revive(failure: Failure) -> bool:
        servers[failure.index].fails_after = None
        return True

    alone, _ = run([FakeServer()], prompts_of(8))
    servers = [FakeServer(fails_after=5), FakeServer(fails_after=0)]
    got, failures = run(servers, prompts_of(8), on_failure=revive)
    assert sorted(failure.index for failure in failures) == [0, 1]
    assert set(got) == everything(8, 4)
    for index, response in got.items():  # repeated requests give the same draws
        assert response.token_ids.tolist() == alone[index].token_ids.tolist()
    redone = [name for name, times in Counter(servers[0].begun + servers[1].begun).items() if times > 1]
    assert redone and all(Counter(servers[0].finished + servers[1].finished)[name] == 1 for name in redone)


class RefusedConnection(FakeServer):
    """Fails at the first request, before anything is awaited."""

    def generate(self, *arguments: Any) -> AsyncIterator[dict[str, Any]]:
        if not self.begun:
            self.begun.append("refused")
            raise ServerFailed("refused")
        return super().generate(*arguments)


def test_work_that_had_not_begun_when_its_server_failed_is_done_too() -> None:
    got, failures = run([RefusedConnection()], prompts_of(5))
    assert set(got) == everything(5, 4) and len(failures) == 1


def test_waiting_for_engines_is_not_taken_for_own_work() -> None:
    never = Dispatch([FakeServer()], 3, 8, ExpectedLengths(), lambda response: None)
    thread = threading.Thread(target=never.next_event, args=(2.0,))
    thread.start()
    assert thread.ident is not None
    waits = []
    while thread.is_alive():
        frame = sys._current_frames().get(thread.ident)
        waits.append(frame is not None and _waits(frame, has_recorder=True))
        time.sleep(0.01)
    assert sum(waits) > len(waits) / 2


def test_the_others_take_over_from_a_server_that_does_not_come_back() -> None:
    servers = [FakeServer(fails_after=3), FakeServer()]
    got, failures = run(servers, prompts_of(8), on_failure=lambda failure: False)
    assert set(got) == everything(8, 4) and [failure.index for failure in failures] == [0]


def test_a_server_may_come_back_when_the_others_have_done_it_all() -> None:
    def come_back_late(failure: Failure) -> bool:
        time.sleep(0.5)
        return True

    servers = [FakeServer(fails_after=3), FakeServer()]
    got, failures = run(servers, prompts_of(4), on_failure=come_back_late)
    assert set(got) == everything(4, 4) and [failure.index for failure in failures] == [0]


def test_a_refused_request_ends_the_generation() -> None:
    with pytest.raises(EngineError, match="too long"):
        run([FakeServer(fails_after=2, error=EngineError("too long"))], prompts_of(3))


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: {"versions": [[2, len(line["token_ids"])]]},
        lambda line: {"versions": [[4, len(line["token_ids"])]]},
        lambda line: {"versions": [[3, len(line["token_ids"]) - 1]]},
        lambda line: {"token_ids": [], "log_probs": [], "versions": []},
        lambda line: {"finish_reason": "abort"},
    ],
    ids=["stale", "never sent", "no version", "empty", "abort"],
)
def test_what_is_no_answer_is_asked_for_again(damage: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    def spoil(line: dict[str, Any]) -> dict[str, Any]:
        return {**line, **damage(line)} if len(server.finished) == 3 else line

    server = FakeServer(change=spoil)
    got, failures = run([server], prompts_of(4))
    assert set(got) == everything(4, 4) and len(failures) == 1
    assert all(response.versions == ((3, len(response.token_ids)),) for response in got.values())


def collect(dispatch: Dispatch, got: list[Response], count: int) -> list[Failure]:
    """Wait for this number of responses. Returns the failures meanwhile."""
    failures = []
    deadline = time.monotonic() + 20
    while len(got) < count:
        event = dispatch.next_event(0.05)
        if isinstance(event, Failure):
            failures.append(event)
        else:
            assert event == "waiting" and time.monotonic() < deadline, event
    return failures


def test_prompts_may_come_at_any_time_and_older_ones_go_first() -> None:
    server, got = FakeServer(length=lambda prompt, seed: 40), list[Response]()
    dispatch = Dispatch([server], 3, 2, ExpectedLengths(), got.append)
    dispatch.start()
    dispatch.submit(submitted(prompts_of(3), 2))
    dispatch.submit(submitted(prompts_of(2), 2, first=3))
    collect(dispatch, got, 10)
    dispatch.submit(submitted(prompts_of(1), 2, first=5))
    collect(dispatch, got, 12)
    dispatch.stop()
    assert [response.index[0] for response in got[::2]] == list(range(6))
    assert server.most_at_once == 2
    seeds = {response.index: response.token_ids[0] for response in got}
    assert seeds[3, 1] == seeds[0, 1], "draws follow from the key and the index, not from the ticket"


def test_a_response_may_go_on_under_weights_that_were_announced() -> None:
    def two_versions(line: dict[str, Any]) -> dict[str, Any]:
        return {**line, "versions": [[3, 1], [4, len(line["token_ids"]) - 1]]}

    server, got = FakeServer(length=lambda prompt, seed: 40, change=two_versions), list[Response]()
    dispatch = Dispatch([server], 3, 8, ExpectedLengths(), got.append)
    dispatch.start()
    dispatch.submit(submitted(prompts_of(1), 2))
    dispatch.expect(4)
    assert collect(dispatch, got, 2) == []
    assert {response.versions for response in got} == {((3, 1), (4, 39))}
    server.change = lambda line: line
    dispatch.renew(4)
    dispatch.submit(submitted(prompts_of(1), 2, first=1))
    collect(dispatch, got, 4)
    dispatch.stop()
    assert {response.versions for response in got[2:]} == {((4, 40),)}


def test_a_failure_from_before_a_server_was_brought_back_is_no_news() -> None:
    server, got = FakeServer(fails_after=0), list[Response]()
    dispatch = Dispatch([server], 3, 8, ExpectedLengths(), got.append)
    dispatch.start()
    dispatch.submit(submitted(prompts_of(1), 2))
    while not dispatch._events.qsize():
        time.sleep(0.01)
    server.fails_after = None
    dispatch.bring_back(0, 4)  # as a refit does that found the server dead
    assert collect(dispatch, got, 2) == []
    dispatch.stop()
    assert {response.versions[0][0] for response in got} == {4}


def test_prompts_are_shared_by_the_length_of_their_answers() -> None:
    """One prompt in five has responses ten times as long; sharing by count would put all of these on one server."""

    def length(prompt: list[int], seed: int) -> int:
        return 50 if prompt[0] % 5 == 1 else 5

    known = ExpectedLengths()
    for prompt in prompts_of(20):
        known.add(prompt.prompt_id, length(prompt.token_ids.tolist(), 0))
    servers = [FakeServer(length), FakeServer(length)]
    run(servers, prompts_of(20), lengths=known)
    assert max(server.tokens for server in servers) / min(server.tokens for server in servers) < 1.3


def test_a_server_with_room_takes_what_waits_behind_long_answers() -> None:
    """The lengths are unknown: a server that has finished gets more prompts."""

    def length(prompt: list[int], seed: int) -> int:
        return 2000 if prompt[0] <= 2 else 10

    servers = [FakeServer(length), FakeServer(length)]
    run(servers, prompts_of(40), responses_per_prompt=1, max_sequences=2)
    assert min(len(server.finished) for server in servers) >= 1
    assert sum(len(server.finished) for server in servers) == 40
    assert all(server.most_at_once <= 2 for server in servers)


def test_copies_of_few_prompts_are_spread() -> None:
    servers = [FakeServer() for _ in range(4)]
    got, _ = run(servers, prompts_of(1), responses_per_prompt=16)
    assert set(got) == everything(1, 16)
    assert all(len(server.finished) == 4 for server in servers)


def test_expected_lengths() -> None:
    lengths = ExpectedLengths()
    assert lengths.of("a", 64) == 64
    lengths.add("a", 10)
    lengths.add("a", 20)
    assert lengths.of("a", 64) == 15 and lengths.of("b", 64) == 15 and lengths.of("a", 8) == 8


def test_seeds_are_distinct_and_fit_a_signed_64_bit_number() -> None:
    seeds = {request_seed((1, 0, 3), index, response) for index in range(50) for response in range(20)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed((1, 0, 3), 0, 1) != request_seed((1, 0, 4), 0, 1)
