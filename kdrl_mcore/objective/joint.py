"""The loss of each token, alpha * L_GRPO + beta * L_KD (arXiv 2506.02208), and the loss of supervised fine-tuning.

T: the response tokens of a micro-batch, concatenated over its responses. Each loss already carries its share of the global
normaliser (`aggregation`): summed over all tokens of all ranks it is the batch loss, and nothing divides it later.
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
    """The inputs of the token losses, each tensor [T] float32.

    Attributes:
        policy_weights, distillation_weights: the token's share of the global loss; 0 where the response is masked.
        on_policy: whether the student's present weights sampled the tokens: then mu is pi, and importance weights are 1.
        old_log_probs: log pi_old; None while strictly on-policy.
        teacher_log_probs: arbitrary where the response is masked; None where the loss does not use them.
        reference_log_probs: log-probs of the reference model; None without one.
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
        """The batch of a range of tokens."""
        return self.map(lambda value: value[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The same batch with `change` applied to every tensor."""
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
    """The weighted loss of each token, and its measurements.

    With `objective.kd.placement=loss` the KD term is added to the loss. With `advantage` the log-ratio is added to the
    advantage, scaled so that the on-policy gradient is the same as with `loss` and k2 (or k1). With `reward` the advantages
    already contain it.

    Args:
        divergence_T: a differentiable per-token reverse KL that replaces the sampled estimator (exact and top-k forms).

    Returns:
        (loss [T], sums, maxima). Over micro-batches and ranks, `sums` are scalars to add and `maxima` scalars to take the
        maximum of. The sums policy_loss, kd_loss and reference_loss are weighted, so they add up to the batch's values;
        kl_k1, kl_k2 and kl_k3, present only without `divergence_T`, are plain sums over the distilled tokens.
    """
    kd = objective.kd
    w_T = _weight(log_probs_T, batch, kd.estimator)
    distilled_T = batch.distillation_weights != 0
    teacher_T = log_probs_T.detach() if batch.teacher_log_probs is None else batch.teacher_log_probs
    # A masked token's teacher log-prob may be anything, NaN included: it is replaced before it can reach a gradient.
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
    else:  # no token of the whole batch is distilled, so the teacher scored none
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
    """The sums that `joint_loss` omits when it is given a divergence, over the D distilled tokens: the sampled estimates, and
    the divergence itself as kl_full."""
    measures = sampled_divergences(d_D) | {"kl_full": divergence_D}
    return {name: value.detach().sum(dtype=torch.float32) for name, value in measures.items()}


def _weight(log_probs_T: Tensor, batch: TokenBatch, estimator: str) -> Tensor:
    """The estimator's w: 1 on-policy, else pi / mu."""
    if batch.on_policy:
        return on_policy_weight(log_probs_T, estimator)
    return importance_weight(log_probs_T, batch.sampler_log_probs)


def sft_loss(log_probs_T: Tensor, weights_T: Tensor) -> Tensor:
    """-log pi(target), weighted [T]."""
    return -log_probs_T * weights_T


def gradient_split(policy_norm: float, distillation_norm: float, total_norm: float) -> dict[str, float]:
    """The metrics of the two gradients a = alpha grad L_GRPO and b = beta grad L_KD, from their norms and the norm of their
    sum: both norms, and their cosine (|a + b|^2 - |a|^2 - |b|^2) / (2 |a| |b|), NaN where one of them is zero."""
    product = 2 * policy_norm * distillation_norm
    cosine = (total_norm**2 - policy_norm**2 - distillation_norm**2) / product if product else float("nan")
    return {"grad_norm_policy": policy_norm, "grad_norm_kd": distillation_norm, "grad_cosine": cosine}
