"""The loss of each token, alpha * L_GRPO + beta * L_KD (arXiv 2506.02208), and of supervised fine-tuning.

T tokens of a micro-batch, flat over its responses. Losses come weighted by the global normaliser (`aggregation`): their sum
over all tokens of all ranks is the loss, and nothing divides it later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.config import ObjectiveConfig
from kdrl_mcore.objective.divergences import ESTIMATORS, importance_weight, log_ratio, on_policy_weight
from kdrl_mcore.objective.policy import sampler_correction, surrogate


@dataclass(frozen=True)
class TokenBatch:
    """What the loss of each token needs, all [T] float32.

    Attributes:
        policy_weights, distillation_weights: the token's share of the global loss; 0 where a response is masked.
        on_policy: the student's present weights sampled the tokens: mu is pi, and importance weights are 1.
        old_log_probs: None while strictly on-policy. teacher_log_probs: anything where masked. reference_log_probs: None
            without it.
    """

    advantages: Tensor
    policy_weights: Tensor
    distillation_weights: Tensor
    sampler_log_probs: Tensor
    on_policy: bool = False
    old_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None

    def __getitem__(self, rows: slice) -> TokenBatch:
        """Some of the tokens."""
        return self.map(lambda value: value[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The same tokens with every tensor changed."""
        changed: dict[str, Any] = {f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **changed)


def joint_loss(
    log_probs_T: Tensor,
    batch: TokenBatch,
    objective: ObjectiveConfig,
    alpha: float,
    beta: float,
    divergence_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The weighted loss of each token, and what was measured.

    With placement `loss` the KD term is added. With `advantage` the log-ratio joins the advantage, scaled so that the
    on-policy gradient is the same as with `loss` and k2 (or k1). With `reward` it is in the advantages already.

    Args:
        divergence_T: a differentiable per-token reverse KL that replaces the sampled estimator (exact and top-k forms).

    Returns:
        (loss [T], sums, maxima): scalars to add up, and scalars to take the maximum of, over micro-batches and ranks. The
        sums policy_loss, kd_loss and reference_loss are weighted, so they add up to the batch's values; kl_k1, kl_k2 and
        kl_k3 are plain sums over the distilled tokens (without `divergence_T`).
    """
    kd = objective.kd
    w_T = _weight(log_probs_T, batch, kd.estimator)
    distilled_T = batch.distillation_weights != 0
    teacher_T = log_probs_T.detach() if batch.teacher_log_probs is None else batch.teacher_log_probs
    # A masked token's teacher log-prob may be anything, NaN included: it is replaced before it can touch a gradient.
    d_T = log_ratio(torch.where(distilled_T, teacher_T, log_probs_T.detach()), log_probs_T, kd.clamp)

    advantages_T = alpha * batch.advantages * batch.policy_weights
    if kd.placement == "advantage":
        advantages_T = advantages_T + beta * d_T.detach() * batch.distillation_weights
    policy_T, clipped_T = surrogate(log_probs_T, batch.old_log_probs, advantages_T, objective.clip_low, objective.clip_high)
    old_T = log_probs_T if batch.old_log_probs is None else batch.old_log_probs
    correction_T = sampler_correction(old_T, batch.sampler_log_probs, objective.sampler_correction)
    loss_T = policy_T * correction_T

    if divergence_T is not None:
        estimate_T = divergence_T
    elif kd.estimator in ESTIMATORS:
        estimate_T = ESTIMATORS[kd.estimator](d_T, w_T)
    else:  # nothing of the whole batch is distilled, so the teacher was not asked
        estimate_T = torch.zeros_like(log_probs_T)
    kd_T = torch.where(distilled_T, estimate_T, 0.0) * batch.distillation_weights
    if kd.placement == "loss" and beta:
        loss_T = loss_T + beta * kd_T
    drift_T = (log_probs_T.detach() - batch.sampler_log_probs).abs()
    sums = {
        "policy_loss": surrogate(log_probs_T, batch.old_log_probs, batch.advantages, objective.clip_low, objective.clip_high)[0]
        * correction_T
        * batch.policy_weights,
        "kd_loss": kd_T,
        "distilled_tokens": distilled_T,
        "clipped_tokens": clipped_T,
        "drift": drift_T,
        "tokens": torch.ones_like(log_probs_T),
    }
    if divergence_T is None:
        sums |= sampled_divergences(d_T)
    if batch.reference_log_probs is not None:
        reference_d_T, form = batch.reference_log_probs - log_probs_T, objective.reference_kl.estimator
        reference_T = ESTIMATORS[form](reference_d_T, _weight(log_probs_T, batch, form)) * batch.policy_weights
        loss_T = loss_T + objective.reference_kl.coefficient * reference_T
        sums["reference_loss"] = reference_T
    return (
        loss_T,
        {name: value.detach().sum(dtype=torch.float32) for name, value in sums.items()},
        {"drift_max": drift_T.max() if len(drift_T) else torch.zeros((), device=drift_T.device)},
    )


def sampled_divergences(d_T: Tensor) -> dict[str, Tensor]:
    """Per-token estimates of the reverse KL from the log-ratio, for the metrics."""
    return {"kl_k1": -d_T, "kl_k2": 0.5 * d_T.square(), "kl_k3": d_T.expm1() - d_T}


def measured_divergences(d_D: Tensor, divergence_D: Tensor) -> dict[str, Tensor]:
    """The sums that `joint_loss` leaves out where it is given a divergence: the sampled ones over the distilled tokens, and the
    divergence itself."""
    measures = sampled_divergences(d_D) | {"kl_full": divergence_D}
    return {name: value.detach().sum(dtype=torch.float32) for name, value in measures.items()}


def _weight(log_probs_T: Tensor, batch: TokenBatch, estimator: str) -> Tensor:
    """w of an estimator: 1 on-policy, else pi / mu."""
    if batch.on_policy:
        return on_policy_weight(log_probs_T, estimator)
    return importance_weight(log_probs_T, batch.sampler_log_probs)


def sft_loss(log_probs_T: Tensor, weights_T: Tensor) -> Tensor:
    """-log pi(target), weighted [T]."""
    return -log_probs_T * weights_T


def gradient_split(policy_norm: float, distillation_norm: float, total_norm: float) -> dict[str, float]:
    """From the norms of alpha grad L_GRPO, beta grad L_KD and their sum: both, and the cosine between them,
    (|a + b|^2 - |a|^2 - |b|^2) / (2 |a| |b|), NaN where one of them is zero."""
    product = 2 * policy_norm * distillation_norm
    cosine = (total_norm**2 - policy_norm**2 - distillation_norm**2) / product if product else float("nan")
    return {"grad_norm_policy": policy_norm, "grad_norm_kd": distillation_norm, "grad_cosine": cosine}
