"""Which groups a step trains on if groups without signal are replaced, with every source and through a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.rollout.group_filter import NO_SIGNAL, SURPLUS, GroupFilter, has_signal
from kdrl_mcore.rollout.ledger import Entry, groups_of
from kdrl_mcore.types import Prompt, Rollout
from tests.support.sources import make, run, through_json

BOTH, RIGHT, WRONG = [True, False], [True, True], [False, False]


def responses(*groups: Sequence[bool], prompt: str = "p") -> list[Rollout]:
    """A group of responses for each list of verdicts."""
    return [
        Rollout(f"{prompt}{number}", number, np.array([1]), np.array([2]), np.zeros(1, np.float32), "stop", 0, correct=correct)
        for number, verdicts in enumerate(groups)
        for correct in verdicts
    ]


def entries_of(rollouts: list[Rollout]) -> list[Entry]:
    return [Entry(("", 0), Prompt(group[0].prompt_id, "", np.array([1]), ""), rollouts=group) for group in groups_of(rollouts)]


def fill(
    first: list[Rollout], *rounds: list[Rollout], wanted: int = 2, allowed: int = 5, teaches: bool = False
) -> tuple[list[str], dict[str, list[str]], dict[str, float]]:
    """The prompts of the chosen groups, those of the dropped groups by reason, and the counts."""
    later = [entries_of(rollouts) for rollouts in rounds]
    choice = GroupFilter(wanted, allowed, teaches).fill(entries_of(first), lambda number, before: later[number - 1])
    sampled = [*first, *(rollout for more in rounds for rollout in more)]
    assert [sampled[index] for index in choice.indices] == [r for entry in choice.chosen for r in entry.rollouts or ()]
    dropped = {reason: [entry.prompt.prompt_id for entry in entries] for reason, entries in choice.dropped.items()}
    return [entry.prompt.prompt_id for entry in choice.chosen], dropped, choice.counts


def test_correctness_makes_a_signal_not_the_reward() -> None:
    group = responses(RIGHT)
    group[0].reward = 0.3
    assert not has_signal(group) and has_signal(responses(BOTH))


def test_enough_groups_with_signal_need_no_further_round() -> None:
    chosen, dropped, counts = fill(responses(BOTH, BOTH))
    assert chosen == ["p0", "p1"] and not any(dropped.values())
    assert counts == {"resampling_rounds": 0, "signal_share": 1.0, "groups_sampled": 2}


def test_further_rounds_bring_what_is_missing_and_no_more() -> None:
    first, *rounds = responses(RIGHT, BOTH), responses(WRONG, WRONG, prompt="q"), responses(BOTH, BOTH, prompt="r")
    chosen, dropped, counts = fill(first, *rounds)
    assert chosen == ["p1", "r0"] and dropped == {NO_SIGNAL: ["p0", "q0", "q1"], SURPLUS: ["r1"]}
    assert counts == {"resampling_rounds": 2, "signal_share": 0.5, "groups_sampled": 6}


def test_after_the_last_round_the_batch_is_filled_up() -> None:
    chosen, dropped, counts = fill(responses(RIGHT, WRONG), responses(WRONG, BOTH, prompt="q"), allowed=1, wanted=3)
    assert chosen == ["q1", "p0", "p1"] and dropped == {NO_SIGNAL: ["q0"], SURPLUS: []}
    assert counts["resampling_rounds"] == 1


def test_groups_without_signal_may_stay_for_a_teacher() -> None:
    chosen, dropped, _ = fill(responses(RIGHT, BOTH), responses(WRONG, BOTH, prompt="q"), teaches=True)
    assert chosen == ["p1", "q1", "p0", "q0"] and not any(dropped.values())


def filtered(ahead: int) -> Any:
    """A source whose odd-numbered prompts have no signal: two groups of two, with two further rounds."""
    source = make(ahead)
    source._filter = GroupFilter(2, 2, False)
    answer = source.engine._answer

    def answers(prompts: Any, sampling: Any, version: int) -> list[Rollout]:
        rollouts = answer([prompt for prompt in prompts for _ in range(2)], sampling, version)
        for index, rollout in enumerate(rollouts):
            rollout.group_id = index // 2
            rollout.correct = index % 2 == 0 and int(rollout.prompt_id[1:]) % 2 == 0
        return rollouts

    source.engine._answer = answers
    return source


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_source_skips_them_and_continues_from_its_checkpoint(ahead: int) -> None:
    whole, stopped, resumed = filtered(ahead), filtered(ahead), filtered(ahead)
    expected = run(whole, [1, 2, 3])
    prompts = [[name for name, *_ in step] for step in expected]
    assert prompts == [["p0", "p0", "p2", "p2"], ["p4", "p4", "p6", "p6"], ["p8", "p8", "p10", "p10"]]
    ages = {"token_age": 6 / 14, "token_age_max": 1} if ahead else {}
    counts = {"prompts_drawn": 12 + 2 * ahead, "prompts_trained": 6, "prompts_dropped": 6, "prompts_waiting": 2 * ahead}
    assert whole.counts == {"resampling_rounds": 1, "signal_share": 0.5, "groups_sampled": 4, **counts, **ages}
    assert whole.ledger.dropped == {NO_SIGNAL: 6, SURPLUS: 0}
    run(stopped, [1, 2])
    stopped.finish()
    resumed._student.version = 2
    resumed.load_state_dict(through_json(stopped.state_dict()))
    assert run(resumed, [3]) == expected[2:] and resumed.counts == whole.counts


def test_each_round_draws_anew() -> None:
    (step,) = run(filtered(0), [1])
    assert [tokens for _, tokens, _ in step] == [[7, 0, 1]] * 2 + [[7, 0, 1, 1]] * 2


def test_only_groups_that_may_stay_are_scored_early_and_by_their_places_in_the_step() -> None:
    """Two rounds of four responses; each round gives its groups in parts, the last one first."""
    source = filtered(0)
    scored: list[dict[int, tuple[str, bool]]] = []
    generate = source.engine.generate

    def in_parts(prompts: Any, sampling: Any, on_part: Any) -> list[Rollout]:
        rollouts = generate(prompts, sampling)
        for group in (1, 0):
            on_part({index: rollout for index, rollout in enumerate(rollouts) if rollout.group_id == group})
        return rollouts

    source.engine.generate = in_parts
    source.refit()
    chosen = source.rollouts(1, lambda part: scored.append({index: (r.prompt_id, r.correct) for index, r in part.items()}))
    assert scored == [{0: ("p0", True), 1: ("p0", False)}, {4: ("p2", True), 5: ("p2", False)}]
    assert source.chosen == [0, 1, 4, 5]
    early = scored[0] | scored[1]
    assert [early[index] for index in source.chosen] == [(rollout.prompt_id, rollout.correct) for rollout in chosen]


def test_all_groups_are_scored_early_where_all_stay() -> None:
    part = dict(enumerate(responses(RIGHT, BOTH)))
    assert GroupFilter(2, 2, True).worth_scoring(part) == part
    assert list(GroupFilter(2, 2, False).worth_scoring(part)) == [2, 3]
