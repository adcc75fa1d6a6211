"""The base model of the student's adapters as its reference and its teacher, on its own or with other adapters: the student
with its own adapters off, not a second copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdrl_mcore.config.derived import DISTRIBUTION
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.model.lora import with_adapters
from kdrl_mcore.model.scoring import score_rollouts
from kdrl_mcore.student.student import Student
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.source import as_read, score_with
from kdrl_mcore.types import Rollout, TokenFloats


class FrozenBase:
    """Scores given tokens with the student's frozen weights, in the student's layout."""

    def __init__(self, student: Student, name: str | None = None, adapters: str | None = None) -> None:
        """Args:
        name: which of `Rollout.teacher_prompts` it reads; None for the student's prompts.
        adapters: which adapters are on instead of the student's (`TEACHER_ADAPTER`); None for none.
        """
        self._student, self._name, self._adapters = student, name, adapters

    @property
    def chunks(self) -> Sequence[LanguageModel]:
        """The student's models of this rank."""
        return self._student.parts.chunks

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """See `ScoreSource`. For a divergence over the vocabulary the teacher's head is the student's, which has no adapter."""
        rollouts = as_read(rollouts, self._name)
        if DISTRIBUTION in wanted:
            self._student.use_own_head_as_teachers()
        with with_adapters(self.chunks, self._adapters):
            return score_with(self._student.parts, rollouts, wanted, temperature=temperature, micro_tokens=micro_tokens)

    def score(self, rollouts: Sequence[Rollout], *, temperature: float, micro_tokens: int) -> list[TokenFloats]:
        """log p(o_t | s_t) [response tokens] for each rollout, on every rank. Collective over the world."""
        with with_adapters(self.chunks, self._adapters):
            scored = score_rollouts(self._student.parts, rollouts, temperature=temperature, micro_tokens=micro_tokens)
        return [log_probs for log_probs, _ in scored]
