"""Corrections for tokens that a sampler mu drew, which differs from the policy: of the policy loss by pi_old / mu, of
distillation by pi / mu.

T response tokens of a micro-batch, N responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig, SamplerCorrectionConfig
from kdrl_mcore.config.derived import bounds_importance
from kdrl_mcore.types import TokenFloats


def sampler_correction(
    old_log_probs_T: Tensor,
    sampler_log_probs_T: Tensor,
    settings: SamplerCorrectionConfig,
    sequence_log_ratios_T: Tensor | None = None,
) -> Tensor:
    """The detached weight [T] of the policy loss of tokens that mu sampled instead of pi_old.

    `truncate`: min(pi_old / mu, bound), truncated importance sampling. `mask`: 1 where pi_old / mu lies in [1/bound, bound],
    else 0. `none`: 1.

    Bias of the policy gradient, relative to its norm, over all sequences of a small policy (`test_sequences_expectation.py`):
    0.57 with `none`; 0.52 and 0.77 with `truncate` and `mask` of tokens at 1.2; 0.06 and 0.48 of sequences at 2 (none without a
    bound); 0.48 with `mask` of the geometric mean at 1.2.

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


def bounded_importance(
    w_T: Tensor, log_probs_T: Tensor, settings: DistillationConfig, response_log_ratios_T: Tensor | None = None
) -> Tensor:
    """w = pi / mu within the bounds of `importance` [T], with the gradient of log pi: `truncate` min(w, bound); `mask` w, or 0
    outside [1/bound, bound].

    It is the bounded number times pi / sg(pi). (Differentiating the bound itself would take the gradient of k1 and k3 from
    every token that it holds.)

    Bias of the gradient, relative to its norm, over all sequences of a small policy (`test_sequences_expectation.py`): 0.20 for
    the token's own w, whose prefixes stay mu's; 0.21 and 0.55 with `truncate` and `mask` at 1.2; none for that of the sequence,
    and 0.06 and 0.24 with bounds of 2; 0.33 with `geometric` at 1.2.

    Args:
        response_log_ratios_T: log pi / mu of each token's response (`sequence_log_ratios`). With `importance_level=sequence`
            its exponential replaces w; with `geometric` it decides which responses `mask` keeps, with each token's own w.
    """
    if not bounds_importance(settings):
        return w_T
    bound, weight_T = settings.importance_bound, w_T.detach()
    judged_T = weight_T if response_log_ratios_T is None else response_log_ratios_T.exp()
    if settings.importance_level == "sequence":
        weight_T = judged_T
    if settings.importance == "truncate":
        weight_T = weight_T.clamp(max=bound)
    elif settings.importance == "mask":
        weight_T = torch.where((judged_T >= 1 / bound) & (judged_T <= bound), weight_T, 0.0)
    return weight_T * (log_probs_T - log_probs_T.detach()).exp()


def effective_share(total: float, squares: float, tokens: float) -> float:
    """The effective sample size (sum w)^2 / sum w^2 as a share of the tokens; 1 for equal weights, 0 if all are 0."""
    return total**2 / (squares * tokens) if squares and tokens else 0.0
