"""Sources of rollouts over an engine whose responses identify the prompt, the draws and the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.rollout.engine import Choose, Request, Sampling, with_beginning
from kdrl_mcore.rollout.given import GivenResponses
from kdrl_mcore.rollout.ledger import groups_of
from kdrl_mcore.rollout.source import Ahead, SampledRollouts
from kdrl_mcore.types import Prompt, Rollout

PROMPTS = [Prompt(f"p{i}", "q", np.array([i]), "a", target=np.array([i, i])) for i in range(20)]
LAST_STEP = 4


class Engine:
    """An engine whose responses identify the prompt, the draws and the weights. What is submitted is complete at once, in the
    order that `order` gives, and counts as sampled with the weights of that moment."""

    verifies = True

    def __init__(self, student: Any) -> None:
        self.student, self.version = student, 0
        self.tickets = 0
        self.complete: dict[int, list[Rollout]] = {}
        self.order: Callable[[list[int]], list[int]] = lambda tickets: tickets

    def refit(self, student: Any) -> None:
        self.version = student.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: Any = None) -> list[Rollout]:
        return self._answer(prompts, sampling, self.version)

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, indices: Sequence[int] | None = None) -> list[int]:
        tickets = list(range(self.tickets, self.tickets + len(prompts)))
        self.tickets += len(prompts)
        groups = groups_of(self._answer(prompts, sampling, self.version))
        self.complete.update(zip(tickets, groups, strict=True))
        return tickets

    def collect(self, choose: Choose) -> dict[int, list[Rollout]]:
        complete = self.order(list(self.complete))
        chosen = next((each for end in range(len(complete) + 1) if (each := choose(complete[:end])) is not None), None)
        assert chosen is not None, "the source would wait forever"
        return {ticket: self.complete.pop(ticket) for ticket in chosen}

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Responses whose lengths follow from the draws; a token's log-prob is minus the version of its weights."""
        result = []
        for group, request in enumerate(requests):
            for number in range(request.first, request.first + request.count):
                whole = 1 + hash((request.key, number)) % sampling.max_response_tokens
                tokens = min(request.tokens, whole - request.position)
                ids = np.arange(request.position, request.position + tokens)
                log_probs = np.full(tokens, -self.version, np.float32)
                ends = request.position + tokens == whole and whole < sampling.max_response_tokens
                part = Rollout(
                    *(request.prompt.prompt_id, group, request.token_ids, ids, log_probs),
                    *("stop" if ends else "length", self.version),
                )
                result.append(with_beginning(request, part, sampling.max_response_tokens, lambda ids: ""))
        return result

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _answer(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        return [
            Rollout(
                *(prompt.prompt_id, group, prompt.token_ids, np.array(sampling.key)),
                *(np.array([-1 / 3] * len(sampling.key), np.float32), "stop", version),
            )
            for group, prompt in enumerate(prompts)
        ]


def make(steps_ahead: int | None = 1, max_age: int | None = None, *, waits: bool = True, last_step: int = LAST_STEP) -> Any:
    """A source at the first step, with two prompts per step. Without an engine (None), it gives the data set's responses."""
    student: Any = SimpleNamespace(version=0)
    stream = PromptStream(PROMPTS, 2, 0, shuffle=False)
    if steps_ahead is None:
        return GivenResponses(stream, student)
    engine = Engine(student)
    ahead = Ahead(engine, steps_ahead, max_age or steps_ahead, waits, last_step, 1) if steps_ahead else None
    return SampledRollouts(engine, student, stream, None, Sampling(1.0, 1.0, 4, 1, (7, 0)), ahead=ahead)


def run(source: Any, steps: Sequence[int]) -> list[Any]:
    """What each of these steps trains on; the weights change after every step."""
    found = []
    for step in steps:
        source.refit()
        rollouts = source.rollouts(step)
        source._student.version += 1
        found.append([(r.prompt_id, r.response_token_ids.tolist(), r.sampler_log_probs.tolist()) for r in rollouts])
    return found


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))
