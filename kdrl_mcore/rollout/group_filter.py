"""Groups without signal: where every response of a prompt is correct, or none is, rewards say nothing about the policy. A step
then samples further prompts until it has enough groups with both (the dynamic sampling of DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kdrl_mcore.types import Rollout


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

    def fill(self, first: list[Rollout], sample: Callable[[int], list[Rollout]]) -> tuple[list[Rollout], dict[str, float]]:
        """The rollouts of a step, its groups numbered anew, and what it took.

        If `rounds` do not bring enough groups with signal, the batch is filled up with others, so that its size, and the
        normaliser, stay the same.

        Args:
            first: the verified responses that were sampled.
            sample: verified responses to the next prompts; takes the number of the round, from 1.
        """
        groups, rounds = _groups(first), 0
        while sum(map(has_signal, groups)) < self.wanted and rounds < self.rounds:
            rounds += 1
            groups += _groups(sample(rounds))
        good = [group for group in groups if has_signal(group)]
        others = [group for group in groups if not has_signal(group)]
        chosen = good[: self.wanted]
        chosen += others if self.teaches_others else others[: max(0, self.wanted - len(chosen))]
        counts = {
            "resampling_rounds": float(rounds),
            "signal_share": len(good) / len(groups),
            "groups_sampled": float(len(groups)),
        }
        return [replace(rollout, group_id=index) for index, group in enumerate(chosen) for rollout in group], counts


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether some responses of a group are correct and some are not. Correctness is compared, not the shaped reward."""
    return 0 < sum(rollout.correct for rollout in group) < len(group)


def _groups(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    return list(groups.values())
