"""Several teachers that share the ranks, or are on servers: each scores its own responses, one teacher after the other, and
where several teach one response their scores are mixed.

Off-loaded teachers are on the device only while they score, so at most one of them is there at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from kdrl_mcore.config import NamedTeacherConfig
from kdrl_mcore.config.derived import DISTRIBUTION
from kdrl_mcore.data.taught import HasColumns, teaches
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.objective.schedules import Coefficient
from kdrl_mcore.teacher.hidden_states import HiddenStates, JoinedStates, States
from kdrl_mcore.teacher.mixture import MIXTURES, portions
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.served import ServedTeacher
from kdrl_mcore.teacher.source import ScoreSource
from kdrl_mcore.types import Rollout, TokenFloats


@dataclass(frozen=True)
class Member:
    """One of several teachers.

    Attributes:
        settings: which prompts it teaches.
        share: its share of beta, a function of the optimizer step.
        source: what scores.
        hidden_size: the width of its hidden states, or of what its servers know of a token.
    """

    settings: NamedTeacherConfig
    share: Coefficient
    source: ScoreSource
    hidden_size: int


class TeacherPool:
    """Several teachers as one source of scores.

    Attributes:
        members: the teachers by name, in the order of the configuration.
    """

    def __init__(self, members: Mapping[str, Member], mixture: str, *, known_top_k: bool = False) -> None:
        """Args:
        mixture: the name of one of `MIXTURES`.
        known_top_k: whether servers report the teachers' most likely tokens; then each response has one teacher.
        """
        self.members, self._known_top_k = members, known_top_k
        self._mixture = MIXTURES[mixture]

    @property
    def chunks(self) -> Sequence[LanguageModel]:
        """The models of this rank."""
        return [chunk for member in self.members.values() for chunk in member.source.chunks]

    def close(self) -> None:
        """Close the connections to servers. Not collective."""
        for member in self.members.values():
            if isinstance(member.source, ServedTeacher):
                member.source.close()

    @property
    def shares(self) -> dict[str, Coefficient]:
        """The schedule of each teacher's share of beta."""
        return {name: member.share for name, member in self.members.items()}

    def shares_of(self, item: HasColumns) -> dict[str, float]:
        """c_k, the present shares of the teachers that teach a response, without those that are 0."""
        found = {name: member.share.value for name, member in self.members.items() if teaches(member.settings, item)}
        return {name: share for name, share in found.items() if share > 0}

    def total_shares(self, rollouts: Sequence[Rollout]) -> Tensor:
        """sum_k c_k of each response [N], by which beta is multiplied; 0 where no teacher teaches it."""
        return torch.tensor([sum(self.shares_of(rollout).values()) for rollout in rollouts], dtype=torch.float64)

    def taught_by(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which teachers teach each response [N], as a sum of 2^k over the teachers' numbers k."""
        numbers = {name: number for number, name in enumerate(self.members)}
        return torch.tensor([sum(1 << numbers[name] for name in self.shares_of(rollout)) for rollout in rollouts])

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """See `ScoreSource`. Every response must have a teacher."""
        shares = {index: portions(self.shares_of(rollout)) for index, rollout in rollouts.items()}
        found: dict[str, TeacherScores] = {}
        for name, member in self.members.items():
            own = {index: rollout for index, rollout in rollouts.items() if name in shares[index]}
            if own:  # the same on every rank
                found[name] = member.source.scores_of(own, wanted, temperature=temperature, micro_tokens=micro_tokens)
        hidden: States | None = None
        own_states = [each.hidden for each in found.values() if isinstance(each.hidden, HiddenStates)]
        if self._known_top_k and own_states:
            hidden = reduce(HiddenStates.joined, own_states)
        elif DISTRIBUTION in wanted:
            sizes = {name: member.hidden_size for name, member in self.members.items()}
            parts = {name: each.hidden for name, each in found.items() if isinstance(each.hidden, HiddenStates)}
            hidden = JoinedStates(sizes, parts, shares)
        return TeacherScores(
            scored={index: min(found[name].scored[index] for name in own) for index, own in shares.items()},
            log_probs=self._mixed({name: each.log_probs for name, each in found.items()}, shares),
            # Of a mixture these are not needed: `config.checks` refuses the settings that would.
            entropies=_of_only_teacher({name: each.entropies for name, each in found.items()}, shares),
            hidden=hidden,
        )

    def _mixed(
        self, found: Mapping[str, Mapping[int, TokenFloats]], shares: Mapping[int, Mapping[str, float]]
    ) -> dict[int, TokenFloats]:
        """The log-probs of each response under what it is taught; those of an only teacher are unchanged."""
        mixed = _of_only_teacher(found, shares)
        for index, own in shares.items():
            if len(own) > 1 and all(index in found[name] for name in own):
                mixed[index] = self._mixture([found[name][index] for name in own], list(own.values()))
        return mixed


def _of_only_teacher(
    found: Mapping[str, Mapping[int, TokenFloats]], shares: Mapping[int, Mapping[str, float]]
) -> dict[int, TokenFloats]:
    only = {index: next(iter(own)) for index, own in shares.items() if len(own) == 1}
    return {index: found[name][index] for index, name in only.items() if index in found[name]}
