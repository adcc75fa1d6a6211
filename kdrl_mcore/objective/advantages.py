"""Advantages relative to a group (GRPO, https://arxiv.org/abs/2402.03300, and others), and the reward-shaping placement of
distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_mcore.errors import DataError

STD_EPSILON = 1e-6


def group_advantages(rewards_N: Tensor, group_ids_N: Tensor, *, normalize_by_std: bool, baseline: str = "group") -> Tensor:
    """A_i = (r_i - mean of its group) / (std of its group + 1e-6) [N], the standard deviation with n - 1.

    Computed in float64. A group whose rewards are all equal gets exactly zero.

    Args:
        normalize_by_std: without it, the mean is subtracted and nothing is divided.
        baseline: `group` as above. `leave_one_out` (RLOO, arXiv 2402.14740): r_i minus the mean of the others of its group,
            G / (G - 1) (r_i - mean). `batch` (REINFORCE++, arXiv 2501.03262): (r_i - mean of its group) divided by the standard
            deviation of these over the batch.

    Raises:
        DataError: a group has a single response, and so nothing to compare it with.
    """
    rewards_N = rewards_N.double()
    groups, index_N, counts = group_ids_N.unique(return_inverse=True, return_counts=True)
    if (counts == 1).any():
        group = int(groups[counts == 1][0])
        raise DataError(
            f"group {group} has a single response: GRPO compares the responses of a group, so it needs at least 2 "
            "(set objective.alpha.init=0 for plain distillation)"
        )
    zeros = rewards_N.new_zeros(len(groups))
    mean_N = (zeros.scatter_add(0, index_N, rewards_N) / counts)[index_N]
    centred_N = torch.where(have_equal_rewards(rewards_N, group_ids_N), 0.0, rewards_N - mean_N)
    if baseline == "leave_one_out":
        return centred_N * (counts / (counts - 1))[index_N]
    if baseline == "batch":
        return centred_N / ((centred_N.square().sum() / (len(centred_N) - 1)).sqrt() + STD_EPSILON)
    if not normalize_by_std:
        return centred_N
    std = (zeros.scatter_add(0, index_N, centred_N.square()) / (counts - 1)).sqrt()
    return centred_N / (std[index_N] + STD_EPSILON)


def have_equal_rewards(rewards_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """Whether all responses of a response's group have the same reward (bool) [N], so that its advantage is 0."""
    groups, index_N = group_ids_N.unique(return_inverse=True)
    zeros = rewards_N.new_zeros(len(groups))
    low = zeros.scatter_reduce(0, index_N, rewards_N, "amin", include_self=False)
    high = zeros.scatter_reduce(0, index_N, rewards_N, "amax", include_self=False)
    return (low == high)[index_N]


def shaped_rewards(rewards_N: Tensor, log_ratio_sums_N: Tensor, beta: float) -> Tensor:
    """r_i + beta * sum_t (log T - log pi) [N], before group normalisation: our reconstruction of the paper's reward shaping."""
    return rewards_N.double() + beta * log_ratio_sums_N.double()
