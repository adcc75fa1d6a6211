"""Corrections for tokens that a sampler mu drew, which differs from the policy: of the policy loss by pi_old / mu, of
distillation by pi / mu.

T response tokens of a micro-batch, N responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig, SamplerCorrectionConfig
from kdrl_mcore.config.derived import bounds_importance
from kdrl_mcore.objective.functions import find_function
from kdrl_mcore.types import OUTSIDE, TokenFloats


def truncate(ratio_T: Tensor, bound: float) -> Tensor:
    """min(ratio, bound)."""
    return ratio_T.clamp(max=bound)


def mask(ratio_T: Tensor, bound: float) -> Tensor:
    """1 where the ratio lies in [1/bound, bound], else 0."""
    return ((ratio_T >= 1 / bound) & (ratio_T <= bound)).to(ratio_T.dtype)


RULES: dict[str, Callable[[Tensor, float], Tensor]] = {"truncate": truncate, "mask": mask}
"""The rules by the names of `objective.sampler_correction.kind` and `kd.importance`: (ratio, bound) -> weight; both [T]."""


def sampler_correction(
    old_log_probs_T: Tensor,
    sampler_log_probs_T: Tensor,
    settings: SamplerCorrectionConfig,
    sequence_log_ratios_T: Tensor | None = None,
) -> Tensor:
    """The detached weight [T] of the policy loss of tokens that mu sampled instead of pi_old.

    `truncate`: min(pi_old / mu, bound), truncated importance sampling. `mask`: 1 where pi_old / mu lies in [1/bound, bound],
    else 0. `none`: 1. Or the result of a user's function of the ratio and the bound.

    Bias of the policy gradient, relative to its norm, over all sequences of a small policy (`test_sequences_expectation.py`):
    0.57 with `none`; 0.52 and 0.77 with `truncate` and `mask` of tokens at 1.2; 0.06 and 0.48 of sequences at 2 (none without a
    bound); 0.48 with `mask` of the geometric mean at 1.2.

    Args:
        sequence_log_ratios_T: log pi_old / mu of each token's response (`sequence_log_ratios`), which replaces the token's own.
    """
    if settings.kind == "none":
        return torch.ones_like(old_log_probs_T)
    log_ratio_T = old_log_probs_T - sampler_log_probs_T if sequence_log_ratios_T is None else sequence_log_ratios_T
    rule = find_function("objective.sampler_correction.kind", settings.kind, RULES)
    return rule(log_ratio_T.detach().exp(), settings.bound)


def sequence_log_ratios(log_probs: Sequence[TokenFloats], others: Sequence[TokenFloats], level: str) -> Tensor:
    """sum_t (log pi - log other) of each response [N], or with `geometric` its mean; float64. Tokens outside the support of
    either (`vocab_parallel.Support`) are left out: they have no weight in the loss themselves."""
    sums, counts = [], []
    for ours, other in zip(log_probs, others, strict=True):
        inside = ~((ours < OUTSIDE) | (other < OUTSIDE))
        sums.append(float((ours[inside].astype("float64") - other[inside]).sum()))
        counts.append(max(int(inside.sum()), 1) if level == "geometric" else 1)
    return torch.tensor(sums, dtype=torch.float64) / torch.tensor(counts, dtype=torch.float64)


def bounded_importance(
    w_T: Tensor, log_probs_T: Tensor, settings: DistillationConfig, response_log_ratios_T: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """w = pi / mu within the bounds of `importance` [T], with the gradient of log pi: `truncate` min(w, bound); `mask` w, or 0
    outside [1/bound, bound]; or the result of a user's function of w and the bound. And where that changed it (bool) [T],
    None where `importance` and its level leave each token's own w.

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
        return w_T, None
    own_T = w_T.detach()
    judged_T = own_T if response_log_ratios_T is None else response_log_ratios_T.exp()
    whole_T = judged_T if settings.importance_level == "sequence" else own_T
    if settings.importance == "mask":
        weight_T = torch.where(mask(judged_T, settings.importance_bound) != 0, whole_T, 0.0)
    elif settings.importance == "full":
        weight_T = whole_T
    else:
        weight_T = find_function("objective.kd.importance", settings.importance, RULES)(whole_T, settings.importance_bound)
    return weight_T * (log_probs_T - log_probs_T.detach()).exp(), weight_T != whole_T


def effective_share(total: float, squares: float, tokens: float) -> float:
    """The effective sample size (sum w)^2 / sum w^2 as a share of the tokens; 1 for equal weights, 0 if all are 0."""
    return total**2 / (squares * tokens) if squares and tokens else 0.0
