"""Groups without signal: if all responses to a prompt are correct, or none is, their rewards contain no information about the
policy. A step then samples further prompts until enough groups have both (the dynamic sampling of DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdrl_mcore.rollout.ledger import Entry
from kdrl_mcore.types import Rollout

NO_SIGNAL, SURPLUS = "no signal", "surplus"
"""Why the filter drops a prompt: its group has no signal, or the step has enough groups that do."""


@dataclass(frozen=True)
class Choice:
    """What a step trains on.

    Attributes:
        chosen: the prompts, in order.
        indices: the index of each of their responses among all that were sampled for the step, in the order of sampling.
        dropped: the other prompts, by reason.
        counts: metrics of the sampling that was needed.
    """

    chosen: list[Entry]
    indices: list[int]
    dropped: dict[str, list[Entry]]
    counts: dict[str, float]


@dataclass(frozen=True)
class GroupFilter:
    """The rule that chooses the groups of a step.

    Attributes:
        wanted: the number of groups of a step.
        rounds: how many times a step may sample `wanted` further prompts.
        teaches_others: whether groups without signal stay in the batch too, for a teacher.
    """

    wanted: int
    rounds: int
    teaches_others: bool

    def fill(self, first: Sequence[Entry], sample: Callable[[int, int], Sequence[Entry]]) -> Choice:
        """Choose the groups of a step.

        If `rounds` do not bring enough groups with signal, the batch is filled up with others, so that its size, and the
        normaliser, stay the same.

        Args:
            first: prompts with verified responses.
            sample: samples further prompts; called with the number of the round, from 1, and the number of responses so far.
        """
        entries, rounds = list(first), 0
        while sum(map(_has_signal, entries)) < self.wanted and rounds < self.rounds:
            rounds += 1
            entries += sample(rounds, sum(len(_responses(entry)) for entry in entries))
        good = [entry for entry in entries if _has_signal(entry)]
        others = [entry for entry in entries if not _has_signal(entry)]
        kept = len(others) if self.teaches_others else max(0, self.wanted - len(good))
        chosen = good[: self.wanted] + others[:kept]
        indices: dict[Entry, range] = {}
        for entry in entries:
            begin = sum(map(len, indices.values()))
            indices[entry] = range(begin, begin + len(_responses(entry)))
        return Choice(
            chosen,
            [index for entry in chosen for index in indices[entry]],
            {NO_SIGNAL: others[kept:], SURPLUS: good[self.wanted :]},
            {
                "resampling_rounds": float(rounds),
                "signal_share": len(good) / len(entries),
                "groups_sampled": float(len(entries)),
            },
        )

    def worth_scoring(self, part: Mapping[int, Rollout]) -> dict[int, Rollout]:
        """The responses in some whole groups that a teacher may score before all are sampled. Groups that will be dropped, or
        will stay only if too few others are found, wait."""
        if self.teaches_others:
            return dict(part)
        by_group: dict[int, list[int]] = {}
        for index, rollout in part.items():
            by_group.setdefault(rollout.group_id, []).append(index)
        kept = [indices for indices in by_group.values() if has_signal([part[index] for index in indices])]
        return {index: part[index] for indices in kept for index in indices}


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether some responses of a group are correct and some are not. Correctness is compared, not the shaped reward."""
    return 0 < sum(rollout.correct for rollout in group) < len(group)


def _has_signal(entry: Entry) -> bool:
    return has_signal(_responses(entry))


def _responses(entry: Entry) -> list[Rollout]:
    assert entry.rollouts is not None
    return entry.rollouts
