"""The policy loss: the ratio pi / pi_old, and the losses that are computed from it and the advantage.

T response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_mcore.config import ObjectiveConfig


def policy_ratio(log_probs_T: Tensor, old_log_probs_T: Tensor | None, sequence_ratios_T: Tensor | None = None) -> Tensor:
    """rho [T], with the gradient of log pi.

    Args:
        old_log_probs_T: log pi_old; without it the batch is strictly on-policy, and rho is 1 in value.
        sequence_ratios_T: S, the geometric mean of rho over each token's response (GSPO, arXiv 2507.18071) or the product,
            which replaces the value: sg(S) pi / sg(pi), since S itself has no gradient here.

    Where pi has moved far from pi_old (by up to 4.4 for a token), an unclipped rho biases the policy gradient by 0.52 of its
    norm, the geometric mean by 0.37 (`test_sequences_expectation.py`): the prefixes stay pi_old's. The product has no bias, if
    every response is weighed alike (`sequence_sum_norm`). Clipping costs more.
    """
    if sequence_ratios_T is not None:
        return sequence_ratios_T * (log_probs_T - log_probs_T.detach()).exp()
    old_T = log_probs_T.detach() if old_log_probs_T is None else old_log_probs_T
    return (log_probs_T - old_T).exp()


def clip(rho_T: Tensor, log_probs_T: Tensor, advantages_T: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """PPO's surrogate -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), and where the clip was active; both [T].

    With `dual_clip` = c, the loss of a negative advantage is at most -c A (arXiv 1912.09729).
    """
    plain_T, clipped_T = rho_T * advantages_T, rho_T.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages_T
    smaller_T, active_T = torch.minimum(plain_T, clipped_T), clipped_T < plain_T
    if objective.dual_clip is not None:
        bound_T = objective.dual_clip * advantages_T
        bounded_T = (advantages_T < 0) & (smaller_T < bound_T)
        smaller_T, active_T = torch.where(bounded_T, bound_T, smaller_T), active_T | bounded_T
    return -smaller_T, active_T


def cispo(rho_T: Tensor, log_probs_T: Tensor, advantages_T: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """-sg(min(rho, 1 + clip_high)) A log pi, and where the bound was active; both [T]. Every token keeps a gradient (CISPO,
    arXiv 2506.13585)."""
    bound = 1 + objective.clip_high
    return -rho_T.detach().clamp(max=bound) * advantages_T * log_probs_T, rho_T.detach() > bound


PolicyLoss = Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], tuple[Tensor, Tensor]]
"""(rho, log pi, A, settings) -> (loss, where it was clipped); all [T]."""
POLICY_LOSSES: dict[str, PolicyLoss] = {"clip": clip, "cispo": cispo}
"""The policy losses by the names of `objective.policy_loss`."""
