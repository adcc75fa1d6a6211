"""Quantities of whole responses that an update needs for each token: verdicts, distillation weights, sequence ratios and random
draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kdrl_mcore.config import ObjectiveConfig
from kdrl_mcore.config.derived import weighs_by_scores
from kdrl_mcore.objective.correction import sequence_log_ratios
from kdrl_mcore.objective.token_weights import ResponseScores, token_weights
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.types import OUTSIDE, Rollout, TokenFloats


def weigh_tokens(
    objective: ObjectiveConfig, batch: TrainingBatch, mask_stop_token: bool, seeds: Sequence[int]
) -> TrainingBatch:
    """The batch with its quantities of whole responses: verdicts, the weight of each token's distillation, sequence ratios, and
    the random draws of a mixture.

    Args:
        mask_stop_token: whether the token that ends a response is left out of distillation.
        seeds: the draws for response i of the batch come from numpy's `default_rng([*seeds, i])`, so they are the same in every
            layout and after a resume.
    """
    scores, rollouts, correction, kd = batch.scores, batch.rollouts, objective.sampler_correction, objective.kd
    now = None if scores is None else [log_probs for log_probs, _ in scores]
    sampler = [rollout.sampler_log_probs for rollout in rollouts]
    ratios_N = None
    if objective.ratio != "token" and batch.old_log_probs is not None and now is not None:
        level = "geometric" if objective.ratio == "sequence" else "sequence"
        ratios_N = sequence_log_ratios(now, batch.old_log_probs, level).exp()
    correction_N = None
    if correction.kind != "none" and correction.level != "token":
        old = batch.old_log_probs or now
        assert old is not None
        correction_N = sequence_log_ratios(old, sampler, correction.level)
    importance_N = None
    if kd.importance_level != "token" and now is not None:
        importance_N = sequence_log_ratios(now, sampler, kd.importance_level)
    ends = [mask_stop_token and rollout.finish_reason == "stop" for rollout in rollouts]
    draws = None
    if kd.mix == "drawn_trust" or ":" in kd.mix:
        lengths = enumerate(len(rollout.response_token_ids) for rollout in rollouts)
        draws = [np.random.default_rng([*seeds, i]).random(length, dtype=np.float32) for i, length in lengths]
    return replace(
        batch,
        correct_N=None if objective.combine.kind == "add" else _correct(rollouts),
        token_weights=_token_weights(objective, batch, ends),
        ends_masked_N=torch.tensor(ends) if any(ends) else None,
        sequence_ratios_N=ratios_N,
        sequence_log_ratios_N=correction_N,
        kd_log_ratios_N=importance_N,
        draws=draws,
    )


def _token_weights(
    objective: ObjectiveConfig, batch: TrainingBatch, ends: Sequence[bool]
) -> Sequence[TokenFloats | None] | None:
    """The weight of each token's distillation; None where all are 1.

    Args:
        ends: whether the response's last token is left out.
    """
    settings, distil = objective.kd.token_weight, batch.distil_N.tolist()
    if settings.kind == "constant" and not any(ends):
        return None
    correct_N = _correct(batch.rollouts).double()
    group_ids_N = torch.tensor([rollout.group_id for rollout in batch.rollouts])
    nothing = [None] * len(batch.rollouts)
    teacher: Sequence[TokenFloats | None] = batch.teacher_log_probs or nothing
    teacher_entropies: Sequence[TokenFloats | None] = batch.teacher_entropies or nothing
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
            log_ratio = np.where(log_probs < OUTSIDE, 0.0, log_teacher - log_probs).astype(np.float32)
            if ends[index]:
                log_ratio[-1:] = 0.0  # it takes up no share
            if batch.scored_N is not None:
                log_ratio[int(batch.scored_N[index]) :] = 0.0  # nor does what the teacher has not read
        responses.append(ResponseScores(len(rollout.response_token_ids), passed, log_ratio, entropy, teacher_entropies[index]))
    return token_weights(responses, settings, ends)


def _correct(rollouts: Sequence[Rollout]) -> Tensor:
    return torch.tensor([rollout.correct for rollout in rollouts])
