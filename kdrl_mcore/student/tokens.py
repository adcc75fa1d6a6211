"""What an update knows of whole responses and spreads over their tokens: verdicts, weights of distillation, sequence ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdrl_mcore.config import ObjectiveConfig
from kdrl_mcore.config.derived import weighs_by_scores
from kdrl_mcore.objective.correction import sequence_log_ratios
from kdrl_mcore.objective.token_weights import ResponseScores, token_weights
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.types import Rollout, TokenFloats


def weigh_tokens(objective: ObjectiveConfig, batch: TrainingBatch, mask_stop_token: bool) -> TrainingBatch:
    """The batch with what is known of whole responses: verdicts, the weight of each token's distillation, and the ratios of
    sequences."""
    scores, rollouts, correction = batch.scores, batch.rollouts, objective.sampler_correction
    now = None if scores is None else [log_probs for log_probs, _ in scores]
    ratios_N = None
    if objective.ratio == "sequence" and batch.old_log_probs is not None and now is not None:
        ratios_N = sequence_log_ratios(now, batch.old_log_probs, "geometric").exp()
    correction_N = None
    if correction.kind != "none" and correction.level != "token":
        old = batch.old_log_probs or now
        assert old is not None
        correction_N = sequence_log_ratios(old, [rollout.sampler_log_probs for rollout in rollouts], correction.level)
    return replace(
        batch,
        correct_N=None if objective.combine.kind == "add" else _correct(rollouts),
        token_weights=_token_weights(objective, batch, mask_stop_token),
        sequence_ratios_N=ratios_N,
        sequence_log_ratios_N=correction_N,
    )


def _token_weights(
    objective: ObjectiveConfig, batch: TrainingBatch, mask_stop_token: bool
) -> Sequence[TokenFloats | None] | None:
    """The weight of each token's distillation; None where all are 1."""
    settings, distil = objective.kd.token_weight, batch.distil_N.tolist()
    ends = [mask_stop_token and rollout.finish_reason == "stop" for rollout in batch.rollouts]
    if settings.kind in ("constant", "teacher_entropy") and not any(ends):
        return None
    correct_N = _correct(batch.rollouts).double()
    group_ids_N = torch.tensor([rollout.group_id for rollout in batch.rollouts])
    teacher: Sequence[TokenFloats | None] = batch.teacher_log_probs or [None] * len(batch.rollouts)
    responses: list[ResponseScores | None] = []
    for index, rollout in enumerate(batch.rollouts):
        if not distil[index]:
            responses.append(None)
            continue
        passed = float(correct_N[group_ids_N == rollout.group_id].mean())
        log_ratio = entropy = None
        if weighs_by_scores(objective):
            log_teacher = teacher[index]
            assert batch.scores is not None and log_teacher is not None
            log_probs, entropy = batch.scores[index]
            log_ratio = log_teacher - log_probs
        responses.append(ResponseScores(len(rollout.response_token_ids), passed, log_ratio, entropy))
    return token_weights(responses, settings, ends)


def _correct(rollouts: Sequence[Rollout]) -> Tensor:
    return torch.tensor([rollout.correct for rollout in rollouts])
