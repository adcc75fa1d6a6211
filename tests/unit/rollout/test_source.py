"""Where the rollouts of a step come from: which prompts and draws each step gets, and how that goes through a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.ahead import SampledAhead
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.source import GivenResponses, RolloutSource, SampledRollouts, refuse_stale
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


def make(kind: type[RolloutSource] = SampledAhead) -> Any:
    """A source that begins at the first step; two prompts a step."""
    student: Any = SimpleNamespace(version=0)
    stream = PromptStream(PROMPTS, 2, 0, shuffle=False)
    if kind is GivenResponses:
        return GivenResponses(stream, student)
    settings = (Engine(student), student, stream, None, Sampling(1.0, 1.0, 4, 1, (7, 0)))
    if kind is SampledAhead:
        return SampledAhead(*settings, last_step=LAST_STEP, updates_per_step=1)
    return SampledRollouts(*settings)


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


def test_a_step_ahead_the_same_prompts_and_draws_come_from_older_weights() -> None:
    now, ahead = make(SampledRollouts), make()
    assert run(now, [1, 2, 3, 4]) == run(ahead, [1, 2, 3, 4])
    assert ahead.engine.begun is None, "nothing is sampled for the step after the last"


def test_a_stale_response_is_refused() -> None:
    rollouts = [Rollout("p7", 2, np.array([3]), np.array([4]), np.zeros(1), "stop", version) for version in (4, 3)]
    refuse_stale(rollouts, version=4, allowed=1)
    with pytest.raises(EngineError, match=r"prompt p7 was sampled with weights of version 3, the student has version 4"):
        refuse_stale(rollouts, version=4, allowed=0)


@pytest.mark.parametrize("kind", [SampledRollouts, SampledAhead, GivenResponses])
def test_a_source_continues_from_its_checkpoint(kind: type[RolloutSource]) -> None:
    whole, stopped, resumed = make(kind), make(kind), make(kind)
    expected = run(whole, [1, 2, 3, 4])
    run(stopped, [1, 2])
    stopped.finish()
    resumed._student.version = 2
    resumed.load_state_dict(through_json(stopped.state_dict()))
    if kind is SampledAhead:  # its responses to step 3 are in the checkpoint, and the engine has the weights of the resumed run
        resumed.engine.generate = None
    assert run(resumed, [3, 4]) == expected[2:]


def test_what_is_still_being_sampled_is_as_if_it_had_not_been_begun() -> None:
    stopped = make()
    run(stopped, [1, 2])
    state = through_json(stopped.state_dict())
    assert state == {"prompts": {"given": 4, "num_prompts": 20}, "pending": None}


@pytest.mark.parametrize("kind", [SampledRollouts, SampledAhead])
@pytest.mark.parametrize("has_cursor", [True, False], ids=["", "of a checkpoint without the earlier cursor"])
def test_what_was_sampled_ahead_can_be_sampled_anew(kind: type[RolloutSource], has_cursor: bool) -> None:
    stopped, resumed = make(), make(kind)
    expected = run(make(), [1, 2, 3])
    run(stopped, [1, 2])
    stopped.finish()
    state = through_json(stopped.state_dict())
    assert len(state["pending"]) == 2 and state["prompts"]["given"] == 6 and state["prompts_before_pending"]["given"] == 4
    if not has_cursor:
        del state["prompts_before_pending"]
    resumed.load_state_dict(state, resamples=kind is SampledAhead)
    assert resumed.state_dict()["pending"] is None
    assert run(resumed, [3]) == expected[2:]


def test_a_checkpoint_of_replayed_rollouts_leaves_the_prompts_at_their_beginning() -> None:
    source = make(SampledRollouts)
    source.load_state_dict({"prompts": None, "pending": None})
    assert run(source, [1]) == run(make(SampledRollouts), [1])


def test_first_rollouts_leave_the_source_where_it_stands() -> None:
    source = make(SampledRollouts)
    looked_at = source.first(3, Sampling(1.0, 1.0, 4, 1, (7, 2)))
    assert [each.prompt_id for each in looked_at] == ["p0", "p1", "p2"]
    assert run(source, [1]) == run(make(SampledRollouts), [1])
