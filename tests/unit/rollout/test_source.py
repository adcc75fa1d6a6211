"""Where the rollouts of a step come from: which prompts and draws each step gets, and how that goes through a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.ahead import SampledAhead
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.given import GivenResponses
from kdrl_mcore.rollout.source import RolloutSource, SampledRollouts, refuse_stale
from kdrl_mcore.types import Rollout
from tests.support.sources import make, run, through_json


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
