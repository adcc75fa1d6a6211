"""Corrections for tokens that a sampler mu drew, which differs from the policy: of the policy loss by pi_old / mu, of
distillation by pi / mu.

T response tokens of a micro-batch, N responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig, SamplerCorrectionConfig
from kdrl_mcore.types import TokenFloats


def sampler_correction(
    old_log_probs_T: Tensor,
    sampler_log_probs_T: Tensor,
    settings: SamplerCorrectionConfig,
    sequence_log_ratios_T: Tensor | None = None,
) -> Tensor:
    """The detached weight [T] of the policy loss of tokens that mu sampled instead of pi_old.

    `truncate`: min(pi_old / mu, bound), truncated importance sampling. `mask`: 1 where pi_old / mu lies in [1/bound, bound],
    else 0. `none`: 1. Bounds bias the gradient.

    Args:
        sequence_log_ratios_T: log pi_old / mu of each token's response (`sequence_log_ratios`), which replaces the token's own.
    """
    if settings.kind == "none":
        return torch.ones_like(old_log_probs_T)
    log_ratio_T = old_log_probs_T - sampler_log_probs_T if sequence_log_ratios_T is None else sequence_log_ratios_T
    ratio_T = log_ratio_T.detach().exp()
    if settings.kind == "truncate":
        return ratio_T.clamp(max=settings.bound)
    return ((ratio_T >= 1 / settings.bound) & (ratio_T <= settings.bound)).to(ratio_T.dtype)


def sequence_log_ratios(log_probs: Sequence[TokenFloats], others: Sequence[TokenFloats], level: str) -> Tensor:
    """sum_t (log pi - log other) of each response [N], or with `geometric` its mean; float64."""
    sums = [float((a.astype("float64") - b).sum()) for a, b in zip(log_probs, others, strict=True)]
    counts = [max(len(each), 1) if level == "geometric" else 1 for each in log_probs]
    return torch.tensor(sums, dtype=torch.float64) / torch.tensor(counts, dtype=torch.float64)


def bounded_importance(w_T: Tensor, log_probs_T: Tensor, settings: DistillationConfig) -> Tensor:
    """w = pi / mu within the bounds of `importance` [T], with the gradient of log pi: `truncate` min(w, bound); `mask` w, or 0
    outside [1/bound, bound].

    It is the bounded number times pi / sg(pi). (Differentiating the bound itself would take the gradient of k1 and k3 from
    every token that it holds.)
    """
    if settings.importance == "full":
        return w_T
    bound, weight_T = settings.importance_bound, w_T.detach()
    inside_T = (weight_T >= 1 / bound) & (weight_T <= bound)
    weight_T = weight_T.clamp(max=bound) if settings.importance == "truncate" else torch.where(inside_T, weight_T, 0.0)
    return weight_T * (log_probs_T - log_probs_T.detach()).exp()


def effective_share(total: float, squares: float, tokens: float) -> float:
    """The effective sample size (sum w)^2 / sum w^2 as a share of the tokens; 1 for equal weights, 0 if all are 0."""
    return total**2 / (squares * tokens) if squares and tokens else 0.0
