"""Groups without signal: where every response of a prompt is correct, or none is, rewards say nothing about the policy. A step
then samples further prompts until it has enough groups with both (the dynamic sampling of DAPO, arXiv 2503.14476)."""

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
        places: of each of their responses, its place among all that were sampled for the step, in the order of sampling.
        dropped: the other prompts, by reason.
        counts: what it took, as metrics.
    """

    chosen: list[Entry]
    places: list[int]
    dropped: dict[str, list[Entry]]
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

    def fill(self, first: Sequence[Entry], sample: Callable[[int, int], Sequence[Entry]]) -> Choice:
        """Choose the groups of a step.

        If `rounds` do not bring enough groups with signal, the batch is filled up with others, so that its size, and the
        normaliser, stay the same.

        Args:
            first: prompts with verified responses.
            sample: further ones; takes the number of the round, from 1, and how many responses were sampled before.
        """
        entries, rounds = list(first), 0
        while sum(map(_has_signal, entries)) < self.wanted and rounds < self.rounds:
            rounds += 1
            entries += sample(rounds, sum(len(_responses(entry)) for entry in entries))
        good = [entry for entry in entries if _has_signal(entry)]
        others = [entry for entry in entries if not _has_signal(entry)]
        kept = len(others) if self.teaches_others else max(0, self.wanted - len(good))
        chosen = good[: self.wanted] + others[:kept]
        places: dict[Entry, range] = {}
        for entry in entries:
            first_place = sum(map(len, places.values()))
            places[entry] = range(first_place, first_place + len(_responses(entry)))
        return Choice(
            chosen,
            [place for entry in chosen for place in places[entry]],
            {NO_SIGNAL: others[kept:], SURPLUS: good[self.wanted :]},
            {
                "resampling_rounds": float(rounds),
                "signal_share": len(good) / len(entries),
                "groups_sampled": float(len(entries)),
            },
        )

    def worth_scoring(self, part: Mapping[int, Rollout]) -> dict[int, Rollout]:
        """Those of some whole groups that a teacher may score before all are sampled: groups that are sure to be dropped, or
        will stay only where too few others are found, wait."""
        if self.teaches_others:
            return dict(part)
        by_group: dict[int, list[int]] = {}
        for place, rollout in part.items():
            by_group.setdefault(rollout.group_id, []).append(place)
        kept = [places for places in by_group.values() if has_signal([part[place] for place in places])]
        return {place: part[place] for places in kept for place in places}


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether some responses of a group are correct and some are not. Correctness is compared, not the shaped reward."""
    return 0 < sum(rollout.correct for rollout in group) < len(group)


def _has_signal(entry: Entry) -> bool:
    return has_signal(_responses(entry))


def _responses(entry: Entry) -> list[Rollout]:
    assert entry.rollouts is not None
    return entry.rollouts
