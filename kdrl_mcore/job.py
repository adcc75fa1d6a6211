"""The parts of a run (built by `build.py`), and the operations that need several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import is_on_policy, needs_scores, wanted_scores
from kdrl_mcore.evaluation.evaluate import Evaluation
from kdrl_mcore.model.scoring import score_rollouts
from kdrl_mcore.objective.schedules import Coefficient
from kdrl_mcore.objective.token_weights import scored_tokens
from kdrl_mcore.rollout.engine import RolloutEngine
from kdrl_mcore.rollout.experts import check_experts
from kdrl_mcore.rollout.source import RolloutSource
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.student.frozen_base import FrozenBase
from kdrl_mcore.student.student import Student
from kdrl_mcore.student.tokens import weigh_tokens
from kdrl_mcore.teacher.pool import TeacherPool
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.served import ServedTeacher
from kdrl_mcore.teacher.source import ScoreSource
from kdrl_mcore.teacher.teacher import Teacher
from kdrl_mcore.types import Rollout, TokenFloats


@dataclass
class Job:
    """Everything one rank needs to train. Methods are collective over the world unless they say otherwise."""

    config: Config
    student: Student
    teacher: ScoreSource | None
    reference: Teacher | FrozenBase | None
    source: RolloutSource
    engine: RolloutEngine | None
    evaluation: Evaluation | None
    alpha: Coefficient
    beta: Coefficient
    mask_stop_token: bool = False
    """Whether the token that ends a response is left out of distillation (`objective.kd.stop_token`)."""

    unshared: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """By teacher, the token ids that mean something else to it: from the first one on, a response is not distilled."""

    @property
    def pool(self) -> TeacherPool | None:
        """The teachers, if there are several."""
        return self.teacher if isinstance(self.teacher, TeacherPool) else None

    @property
    def shares(self) -> dict[str, Coefficient]:
        """The schedules of the shares that several teachers have of beta; empty for one."""
        return {} if self.pool is None else self.pool.shares

    def has_teacher(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Whether some teacher teaches each response at this step [N]. Not collective."""
        if self.pool is None:
            return torch.ones(len(rollouts), dtype=torch.bool)
        return self.pool.total_shares(rollouts) > 0

    def score_with_teacher(self, scores: TeacherScores, rollouts: Mapping[int, Rollout], distil_N: Tensor) -> None:
        """Let the teacher score each response to distil once, up to its last token with a weight, and no others. The log-probs
        of whole responses are also stored in the rollouts, for the step's rollout file.

        Args:
            scores: the teacher's scores of this batch; new ones are added.
            rollouts: some or all of the batch, by their index in it.
            distil_N: which of these are distilled.
        """
        objective = self.config.objective
        lengths = self.scored_tokens(list(rollouts.values()), distil_N).tolist()
        wanted = {
            index: rollout.with_response(tokens)
            for (index, rollout), tokens, distil in zip(rollouts.items(), lengths, distil_N.tolist(), strict=True)
            if distil and tokens and index not in scores
        }
        if wanted:
            assert self.teacher is not None
            temperature, micro_tokens = self.config.rollout.temperature, self.config.batch.micro_tokens
            kinds = wanted_scores(objective)
            found = self.teacher.scores_of(wanted, kinds, temperature=temperature, micro_tokens=micro_tokens)
            scores.add(found, {index: len(rollouts[index].response_token_ids) for index in wanted})
        for (index, rollout), tokens, distil in zip(rollouts.items(), lengths, distil_N.tolist(), strict=True):
            if distil and not tokens and index not in scores:
                scores.skip(index, len(rollout.response_token_ids))
            rollout.teacher_log_probs = scores.log_probs.get(index) if tokens == len(rollout.response_token_ids) else None

    def scored_tokens(self, rollouts: Sequence[Rollout], distil_N: Tensor) -> Tensor:
        """How many tokens of each response, from its start, the teacher scores [N]. Not collective."""
        lengths_N = torch.tensor([len(rollout.response_token_ids) for rollout in rollouts], dtype=torch.long)
        scored_N = scored_tokens(self.config.objective.kd.token_weight, lengths_N, distil_N)
        if not any(self.unshared.values()):
            return scored_N
        readable = [np.append(np.isin(each.response_token_ids, self._unshared_in(each)), True).argmax() for each in rollouts]
        return torch.minimum(scored_N, torch.tensor(readable, dtype=torch.long))

    def _unshared_in(self, rollout: Rollout) -> NDArray[np.int64]:
        """The token ids that one of the response's teachers does not share."""
        names = self.unshared if self.pool is None else self.pool.shares_of(rollout)
        return np.array(sorted({each for name in names for each in self.unshared.get(name, ())}), dtype=np.int64)

    def split(self, rollouts: Sequence[Rollout], teacher: TeacherScores, distil_N: Tensor) -> list[TrainingBatch]:
        """Split the rollouts into one batch per optimizer update. With more than one, the later updates are off-policy, so
        log pi_old is computed here, once; with `objective.clip_against=sampler` mu takes its place."""
        updates = self.config.batch.updates_per_step
        replay = self.student.parts.replay
        if replay is not None:
            check_experts(rollouts, replay.num_layers, replay.per_token, replay.num_experts)
        old: list[TokenFloats] | None = None
        if self.config.objective.clip_against == "sampler":
            old = [rollout.sampler_log_probs for rollout in rollouts]
        elif updates > 1:
            old = [log_probs for log_probs, _ in self._present_scores(rollouts)]
        reference = None if self.reference is None else self._score(self.reference, rollouts)

        def of_all(scores: Mapping[int, TokenFloats]) -> list[TokenFloats | None] | None:
            return [scores.get(index) for index in range(len(rollouts))] if scores else None

        batch = TrainingBatch(
            rollouts,
            distil_N,
            is_on_policy(self.config),
            of_all(teacher.log_probs),
            teacher.hidden,
            old,
            reference,
            teacher_entropies=of_all(teacher.entropies),
            scored_N=self.scored_tokens(rollouts, distil_N),
            teacher_shares_N=None if self.pool is None else self.pool.total_shares(rollouts),
            taught_by_N=None if self.pool is None else self.pool.taught_by(rollouts),
        )
        return batch.split_by_group(updates)

    def score_before_update(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with log pi and entropies at the present weights, if a setting needs whole responses before the update."""
        return replace(batch, scores=self._present_scores(batch.rollouts)) if needs_scores(self.config) else batch

    def weigh_tokens(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with its tokens' distillation weights and its quantities of whole responses. Not collective."""
        seeds = (self.config.trainer.seed, self.student.version)
        return weigh_tokens(self.config.objective, batch, self.mask_stop_token, seeds)

    def close(self) -> None:
        """End every process that the job started, and its connections. Not collective."""
        teacher = self.teacher if isinstance(self.teacher, ServedTeacher | TeacherPool) else None
        for part in (self.engine, self.source, self.evaluation, teacher):
            if part is not None:
                part.close()

    def _present_scores(self, rollouts: Sequence[Rollout]) -> list[tuple[TokenFloats, TokenFloats]]:
        return score_rollouts(
            self.student.parts,
            rollouts,
            temperature=self.config.rollout.temperature,
            micro_tokens=self.config.batch.micro_tokens,
            support=self.student.support,
            replay_experts=self.student.parts.replay is not None,
        )

    def _score(self, model: Teacher | FrozenBase, rollouts: Sequence[Rollout]) -> list[TokenFloats]:
        return model.score(rollouts, temperature=self.config.rollout.temperature, micro_tokens=self.config.batch.micro_tokens)
