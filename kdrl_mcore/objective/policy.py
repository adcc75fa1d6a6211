"""The clipped policy-gradient surrogate, and the correction for a sampler that differs from the trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_mcore.config import SamplerCorrectionConfig


def surrogate(
    log_probs_T: Tensor, old_log_probs_T: Tensor | None, advantages_T: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) with rho = pi / pi_old, and whether the clip was active; both [T].

    Without `old_log_probs_T` the batch is strictly on-policy: rho is 1 in value and carries the gradient.
    """
    old_T = log_probs_T.detach() if old_log_probs_T is None else old_log_probs_T
    rho_T = (log_probs_T - old_T).exp()
    plain_T, clipped_T = rho_T * advantages_T, rho_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    return -torch.minimum(plain_T, clipped_T), clipped_T < plain_T


def sampler_correction(old_log_probs_T: Tensor, sampler_log_probs_T: Tensor, settings: SamplerCorrectionConfig) -> Tensor:
    """The detached weight [T] of the policy loss of tokens that mu sampled instead of pi_old.

    `truncate`: min(pi_old / mu, bound), truncated importance sampling. `mask`: 1 where pi_old / mu lies in [1/bound, bound],
    else 0. `none`: 1.
    """
    ratio_T = (old_log_probs_T - sampler_log_probs_T).detach().exp()
    if settings.kind == "truncate":
        return ratio_T.clamp(max=settings.bound)
    if settings.kind == "mask":
        return ((ratio_T >= 1 / settings.bound) & (ratio_T <= settings.bound)).to(ratio_T.dtype)
    return torch.ones_like(ratio_T)
