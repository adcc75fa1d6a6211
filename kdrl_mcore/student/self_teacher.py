"""The student as its own teacher: its present or earlier weights, which read another prompt (arXiv 2601.18734, 2601.19897,
2601.20802)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from kdrl_mcore.config.derived import DISTRIBUTION
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.student.student import Student
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.source import as_read, score_with
from kdrl_mcore.types import Rollout


class SelfTeacher:
    """Scores given tokens with the student's own layers, in which earlier weights replace the present ones."""

    def __init__(self, student: Student, name: str | None = None) -> None:
        """Args:
        name: which of `Rollout.teacher_prompts` it reads; None for the student's prompts.
        """
        self._student, self._name = student, name

    @property
    def chunks(self) -> Sequence[LanguageModel]:
        """The student's models of this rank."""
        return self._student.parts.chunks

    def weights(self) -> AbstractContextManager[None]:
        """Inside it the student's layers have the teacher's weights. Collective over the data-parallel group."""
        return self._student.optimizer.earlier_weights()

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """See `ScoreSource`. For a divergence over the vocabulary the teacher's head is that of the same weights."""
        read = as_read(rollouts, self._name)
        with self.weights():
            scores = score_with(self._student.parts, read, wanted, temperature=temperature, micro_tokens=micro_tokens)
            if DISTRIBUTION in wanted:
                self._student.use_own_head_as_teachers()
        return scores
