"""Groups without signal: where every response of a prompt is correct, or none is, rewards say nothing about the policy. A step
then samples further prompts until it has enough groups with both (the dynamic sampling of DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kdrl_mcore.types import Rollout


@dataclass(frozen=True)
class Filled:
    """What a step trains on.

    Attributes:
        rollouts: the chosen groups, numbered anew.
        places: of each rollout, its place among all that were sampled for the step, in the order of sampling.
        counts: what it took, as metrics.
    """

    rollouts: list[Rollout]
    places: list[int]
    counts: dict[str, float]


@dataclass(frozen=True)
class GroupFilter:
    """What a step trains on.

    Attributes:
        wanted: the groups of a step.
        rounds: how often a step may sample `wanted` further prompts.
        teaches_others: groups without signal stay in the batch beside the others, where a teacher can use them.
    """

    wanted: int
    rounds: int
    teaches_others: bool

    def fill(self, first: list[Rollout], sample: Callable[[int, int], list[Rollout]]) -> Filled:
        """Choose the groups of a step.

        If `rounds` do not bring enough groups with signal, the batch is filled up with others, so that its size, and the
        normaliser, stay the same.

        Args:
            first: the verified responses that were sampled.
            sample: verified responses to the next prompts; takes the number of the round, from 1, and how many responses were
                sampled before.
        """
        sampled, groups, rounds = list(first), _groups(first), 0
        while sum(has_signal(_of(sampled, group)) for group in groups) < self.wanted and rounds < self.rounds:
            rounds += 1
            more, before = sample(rounds, len(sampled)), len(sampled)
            groups += [[before + place for place in group] for group in _groups(more)]
            sampled += more
        good = [group for group in groups if has_signal(_of(sampled, group))]
        others = [group for group in groups if not has_signal(_of(sampled, group))]
        chosen = good[: self.wanted]
        chosen += others if self.teaches_others else others[: max(0, self.wanted - len(chosen))]
        return Filled(
            [replace(rollout, group_id=index) for index, group in enumerate(chosen) for rollout in _of(sampled, group)],
            [place for group in chosen for place in group],
            {
                "resampling_rounds": float(rounds),
                "signal_share": len(good) / len(groups),
                "groups_sampled": float(len(groups)),
            },
        )

    def worth_scoring(self, part: Mapping[int, Rollout]) -> dict[int, Rollout]:
        """Those of some whole groups that a teacher may score before all are sampled: groups that are sure to be dropped, or
        will stay only where too few others are found, wait."""
        if self.teaches_others:
            return dict(part)
        places, rollouts = list(part), list(part.values())
        kept = [place for group in _groups(rollouts) if has_signal(_of(rollouts, group)) for place in group]
        return {places[place]: rollouts[place] for place in kept}


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether some responses of a group are correct and some are not. Correctness is compared, not the shaped reward."""
    return 0 < sum(rollout.correct for rollout in group) < len(group)


def _groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The places of each group's responses."""
    groups: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group_id, []).append(place)
    return list(groups.values())


def _of(rollouts: Sequence[Rollout], places: Sequence[int]) -> list[Rollout]:
    return [rollouts[place] for place in places]
