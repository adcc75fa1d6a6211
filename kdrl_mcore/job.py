"""The parts of a run (built by `build.py`), and the operations that need several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import compares_over_vocabulary, is_on_policy, needs_scores
from kdrl_mcore.evaluation.evaluate import Evaluation
from kdrl_mcore.model.scoring import score_rollouts
from kdrl_mcore.objective.schedules import Coefficient
from kdrl_mcore.rollout.engine import RolloutEngine
from kdrl_mcore.rollout.source import RolloutSource
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.student.student import Student
from kdrl_mcore.teacher.teacher import Teacher, TeacherScores
from kdrl_mcore.types import Rollout, TokenFloats


@dataclass
class Job:
    """Everything one rank needs to train. Methods are collective over the world unless they say otherwise."""

    config: Config
    student: Student
    teacher: Teacher | None
    reference: Teacher | None
    source: RolloutSource
    engine: RolloutEngine | None
    evaluation: Evaluation | None
    alpha: Coefficient
    beta: Coefficient
    mask_stop_token: bool = False
    """Whether the token that ends a response is left out of distillation (`objective.kd.stop_token`)."""

    def score_with_teacher(self, scores: TeacherScores, rollouts: Mapping[int, Rollout], distil_N: Tensor) -> None:
        """Let the teacher score each response to distil once, and no others. Log-probs are also stored in the rollouts, for the
        step's rollout file.

        Args:
            scores: the teacher's scores of this batch; new ones are added.
            rollouts: some or all of the batch, by their index in it.
            distil_N: which of these are distilled.
        """
        wanted = {
            index: rollout
            for (index, rollout), distil in zip(rollouts.items(), distil_N.tolist(), strict=True)
            if distil and index not in scores
        }
        if wanted:
            assert self.teacher is not None
            if compares_over_vocabulary(self.config.objective):
                hidden = self.teacher.hidden_states(wanted, micro_tokens=self.config.batch.micro_tokens)
                scores.hidden = hidden.joined(scores.hidden)
            else:
                scores.log_probs.update(zip(wanted, self._score(self.teacher, list(wanted.values())), strict=True))
            scores.tokens += sum(len(rollout.response_token_ids) for rollout in wanted.values())
        for index, rollout in rollouts.items():
            rollout.teacher_log_probs = scores.log_probs.get(index)

    def split(self, rollouts: Sequence[Rollout], teacher: TeacherScores, distil_N: Tensor) -> list[TrainingBatch]:
        """Split the rollouts into one batch per optimizer update. With more than one, the later updates are off-policy, so
        log pi_old is computed here, once."""
        updates = self.config.batch.updates_per_step
        old = [log_probs for log_probs, _ in self._present_scores(rollouts)] if updates > 1 else None
        reference = None if self.reference is None else self._score(self.reference, rollouts)
        teacher_log_probs = [teacher.log_probs.get(index) for index in range(len(rollouts))] if teacher.log_probs else None
        on_policy = is_on_policy(self.config)
        batch = TrainingBatch(rollouts, distil_N, on_policy, teacher_log_probs, teacher.hidden, old, reference)
        return batch.split_by_group(updates)

    def score_before_update(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with log pi and entropies at the present weights, if a setting needs whole responses before the update."""
        return replace(batch, scores=self._present_scores(batch.rollouts)) if needs_scores(self.config) else batch

    def close(self) -> None:
        """End every process that the job started. Not collective."""
        for part in (self.engine, self.source, self.evaluation):
            if part is not None:
                part.close()

    def _present_scores(self, rollouts: Sequence[Rollout]) -> list[tuple[TokenFloats, TokenFloats]]:
        rollout, batch = self.config.rollout, self.config.batch
        return score_rollouts(self.student.parts, rollouts, temperature=rollout.temperature, micro_tokens=batch.micro_tokens)

    def _score(self, model: Teacher, rollouts: Sequence[Rollout]) -> list[TokenFloats]:
        return model.score(rollouts, temperature=self.config.rollout.temperature, micro_tokens=self.config.batch.micro_tokens)
