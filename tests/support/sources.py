"""Sources of rollouts over an engine that answers with what tells the prompt, the draws and the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.given import GivenResponses
from kdrl_mcore.rollout.source import Ahead, SampledRollouts
from kdrl_mcore.types import Prompt, Rollout

PROMPTS = [Prompt(f"p{i}", "q", np.array([i]), "a", target=np.array([i, i])) for i in range(20)]
LAST_STEP = 4


class Engine:
    """Answers with what tells the prompt, the draws and the weights."""

    verifies = True

    def __init__(self, student: Any) -> None:
        self.student, self.version, self.begun = student, 0, None

    def refit(self, student: Any) -> None:
        assert self.begun is None
        self.version = student.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: Any = None) -> list[Rollout]:
        assert self.begun is None
        return self._answer(prompts, sampling, self.version)

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        assert self.begun is None
        self.begun: Any = (prompts, sampling, self.version)

    def finish(self) -> list[Rollout]:
        begun, self.begun = self.begun, None
        return self._answer(*begun)

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


def make(steps_ahead: int | None = 1) -> Any:
    """A source that begins at the first step; two prompts a step. None: the data set's own responses."""
    student: Any = SimpleNamespace(version=0)
    stream = PromptStream(PROMPTS, 2, 0, shuffle=False)
    if steps_ahead is None:
        return GivenResponses(stream, student)
    engine = Engine(student)
    ahead = Ahead(engine, LAST_STEP, 1) if steps_ahead else None
    return SampledRollouts(engine, student, stream, None, Sampling(1.0, 1.0, 4, 1, (7, 0)), ahead=ahead)


def run(source: Any, steps: Sequence[int]) -> list[Any]:
    """What each of these steps trains on; the weights change after each."""
    found = []
    for step in steps:
        source.refit()
        rollouts = source.rollouts(step)
        source._student.version += 1
        found.append([(r.prompt_id, r.response_token_ids.tolist(), r.sampler_log_probs.tolist()) for r in rollouts])
    return found


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))
