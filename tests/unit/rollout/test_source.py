"""Sources of a step's rollouts: which prompts and draws each step gets, and how a checkpoint keeps them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.files import to_row
from kdrl_mcore.rollout.partial import PartialSampling
from kdrl_mcore.rollout.source import Ahead, SampledRollouts, refuse_stale
from kdrl_mcore.types import Rollout
from tests.support.sources import PROMPTS, make, run, through_json


def test_a_step_ahead_the_same_prompts_and_draws_come_from_older_weights() -> None:
    now, ahead = make(0), make(1)
    assert run(now, [1, 2, 3, 4]) == run(ahead, [1, 2, 3, 4])
    assert ahead.engine.tickets == 8, "something was sampled for the step after the last"


def test_a_stale_response_is_refused() -> None:
    rollouts = [Rollout("p7", 2, np.array([3]), np.array([4]), np.zeros(1), "stop", version) for version in (4, 3)]
    refuse_stale(rollouts, version=4, allowed=1)
    with pytest.raises(EngineError, match=r"prompt p7 was sampled with weights of version 3, but the student has version 4"):
        refuse_stale(rollouts, version=4, allowed=0)


@pytest.mark.parametrize("steps_ahead", [1, 2, 3, 5])
@pytest.mark.parametrize("waits", [True, False])
def test_so_many_steps_ahead_prompts_keep_their_order_and_tokens_their_bound(steps_ahead: int, waits: bool) -> None:
    now, ahead = make(0, last_step=8), make(steps_ahead, waits=waits, last_step=8)
    ahead.engine.order = lambda tickets: tickets[::-1]
    expected, ages = run(now, range(1, 9)), []
    for step in range(1, 9):
        assert run(ahead, [step]) == [expected[step - 1]]
        ages.append(ahead.counts["token_age_max"])
        assert ahead.counts["prompts_waiting"] == 2 * min(steps_ahead, 8 - step)
    assert ages == [min(step, steps_ahead) for step in range(8)]
    assert ahead.counts["prompts_trained"] == 16 and ahead.engine.complete == {}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("steps_ahead", "max_age"), [(2, 3), (2, 5), (3, 9)])
def test_complete_groups_overtake_until_others_are_due(steps_ahead: int, max_age: int, seed: int) -> None:
    """The order in which groups are completed changes at every look; two of three runs stop on the way and resume."""
    source, random = make(steps_ahead, max_age, waits=False, last_step=10), np.random.default_rng(seed)

    def mixed(tickets: list[int]) -> list[int]:
        return random.permutation(tickets).tolist()

    source.engine.order = mixed
    trained: list[list[int]] = []
    for step in range(1, 11):
        if random.random() < 0.2:
            stopped, source = source, make(steps_ahead, max_age, waits=False, last_step=10)
            stopped.finish()
            source._student.version, source.engine.order = stopped._student.version, mixed
            source.load_state_dict(through_json(stopped.state_dict()))
        (batch,) = run(source, [step])
        trained.append([int(name[1:]) for name, *_ in batch])
        assert source.counts["token_age_max"] <= max_age
    assert sorted(prompt for step in trained for prompt in step) == list(range(20))
    lateness = [step - prompt // 2 for step, prompts in enumerate(trained) for prompt in prompts]
    assert max(lateness) <= max_age - steps_ahead
    assert max(lateness) > 0, "none were overtaken"


@pytest.mark.parametrize("ahead", [0, 1, None])
def test_a_source_continues_from_its_checkpoint(ahead: int | None) -> None:
    whole, stopped, resumed = make(ahead), make(ahead), make(ahead)
    expected = run(whole, [1, 2, 3, 4])
    run(stopped, [1, 2])
    stopped.finish()
    resumed._student.version = 2
    resumed.load_state_dict(through_json(stopped.state_dict()))
    if ahead:  # step 3's responses are in the checkpoint, and the engine has the resumed run's weights
        assert [entry.rollouts is not None for entry in resumed.ledger.waiting] == [True, True]
    assert run(resumed, [3, 4]) == expected[2:]
    if ahead:
        assert resumed.engine.tickets == 2


def test_what_is_still_being_sampled_is_sampled_from_the_checkpoint_on() -> None:
    stopped, resumed = make(), make()
    expected = run(make(), [1, 2, 3])
    run(stopped, [1, 2])
    state = through_json(stopped.state_dict())
    assert [row["responses"] for row in state["ledger"]["waiting"]] == [None, None]
    resumed.load_state_dict(state)
    assert run(resumed, [3]) == expected[2:]


def as_of_0_2(state: dict[str, Any], *, has_cursor: bool) -> dict[str, Any]:
    """A checkpoint, as version 0.2 wrote it, with the responses to the next step's prompts."""
    rows = [row for entry in state["ledger"]["waiting"] for row in entry["responses"]]
    cursor = state["prompts"]
    before = {"prompts_before_pending": {**cursor, "given": cursor["given"] - 2}} if has_cursor else {}
    return {"step": 2, "prompts": cursor, "pending": rows, **before}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("version", ["now", "0.2", "0.2 without the earlier cursor"])
def test_what_was_sampled_ahead_can_be_sampled_anew(ahead: int, version: str) -> None:
    stopped, resumed = make(), make(ahead)
    expected = run(make(), [1, 2, 3])
    run(stopped, [1, 2])
    stopped.finish()
    state = through_json(stopped.state_dict())
    assert [len(row["responses"]) for row in state["ledger"]["waiting"]] == [1, 1] and state["prompts"]["given"] == 6
    if version != "now":
        state = as_of_0_2(state, has_cursor=version == "0.2")
    resumed.load_state_dict(state, resamples=bool(ahead))
    assert all(entry.rollouts is None for entry in resumed.ledger.waiting)
    assert run(resumed, [3]) == expected[2:]


def test_a_checkpoint_of_0_2_goes_on_with_the_responses_that_it_holds() -> None:
    stopped, resumed = make(), make()
    expected = run(make(), [1, 2, 3, 4])
    run(stopped, [1, 2])
    stopped.finish()
    resumed._student.version = 2
    resumed.load_state_dict(as_of_0_2(through_json(stopped.state_dict()), has_cursor=True))
    assert not resumed.ledger.due(2) and len(resumed.ledger.due(3)) == 2
    assert run(resumed, [3, 4]) == expected[2:]
    assert resumed.ledger.counts() == {"prompts_drawn": 8, "prompts_trained": 8, "prompts_dropped": 0, "prompts_waiting": 0}


def test_a_checkpoint_of_replayed_rollouts_leaves_the_prompts_at_their_beginning() -> None:
    source = make(0)
    source.load_state_dict({"prompts": None, "pending": None})
    assert run(source, [1]) == run(make(0), [1])


def test_first_rollouts_leave_the_source_where_it_stands() -> None:
    source = make(0)
    looked_at = source.first(3, Sampling(1.0, 1.0, 4, 1, (7, 2)))
    assert [each.prompt_id for each in looked_at] == ["p0", "p1", "p2"]
    assert run(source, [1]) == run(make(0), [1])


LONGEST, PART = 12, 4


def in_parts(steps_ahead: int, max_age: int, most: int | None, steps: int) -> Any:
    source, stream = make(0), PromptStream(PROMPTS, 2, 0, shuffle=False)
    ahead = Ahead(PartialSampling(PART, most), steps_ahead, max_age, False, steps, 1)
    sampling = Sampling(1.0, 1.0, LONGEST, 3, (7, 0))
    return SampledRollouts(source.engine, source._student, stream, None, sampling, ahead=ahead)


@pytest.mark.parametrize(("steps_ahead", "max_age", "most"), [(1, 1, None), (1, 2, 0), (2, 5, 1), (3, 4, None)])
def test_a_response_goes_on_in_later_steps_and_through_checkpoints(
    steps_ahead: int, max_age: int, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt is trained on once, with complete responses whose tokens have the versions that sampled them; a run that
    resumes at every step does the same."""
    monkeypatch.setattr(SampledRollouts, "_verify", lambda *_: None)
    steps, whole = 10, in_parts(steps_ahead, max_age, most, 10)
    source, trained, continued = in_parts(steps_ahead, max_age, most, 10), [], []
    for step in range(1, steps + 1):
        for each in (whole, source):
            each._student.version = step - 1
            each.refit()
        rollouts = whole.rollouts(step)
        assert list(map(to_row, source.rollouts(step))) == list(map(to_row, rollouts))
        assert whole.counts == source.counts and whole.counts["token_age_max"] <= max_age
        for rollout in rollouts:
            versions = [version for version, count in rollout.versions for _ in range(count)]
            assert (-rollout.sampler_log_probs).tolist() == versions == sorted(versions)
            assert rollout.response_token_ids.tolist() == list(range(len(versions)))
            assert (rollout.finish_reason == "length") is (len(versions) == LONGEST)
            assert rollout.continuations == min((len(versions) - 1) // PART, LONGEST if most is None else most)
        trained += [rollout.prompt_id for rollout in rollouts]
        continued.append(whole.counts["continued_share"])
        state = through_json(source.state_dict())
        source = in_parts(steps_ahead, max_age, most, 10)
        source.load_state_dict(state)
    assert sorted(trained) == sorted(prompt.prompt_id for prompt in PROMPTS for _ in range(3))
    assert whole.counts["prompts_waiting"] == whole.counts["responses_unfinished"] == 0
    assert (max(continued) > 0) is (most != 0)


def test_responses_in_parts_are_begun_anew_with_other_settings_or_by_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampledRollouts, "_verify", lambda *_: None)
    stopped = in_parts(2, 4, None, 10)
    stopped.refit()
    stopped.rollouts(1)
    state = through_json(stopped.state_dict())
    assert any(entry["begun"] for entry in state["ledger"]["waiting"])
    for resumed in (in_parts(2, 4, None, 10), make(2, last_step=10), make(0, last_step=10)):
        resumed.load_state_dict(state, resamples=True)
        assert all(entry.begun is None for entry in resumed.ledger.waiting)
        resumed.refit()
        assert [len(resumed.rollouts(step)) > 0 for step in range(2, 11)] == [True] * 9
        assert resumed.counts["prompts_trained"] == 20 and resumed.counts["prompts_waiting"] == 0
