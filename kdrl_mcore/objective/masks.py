"""Reward-guided masks: which responses are distilled."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_mask(correct_N: Tensor, group_ids_N: Tensor, mask: str) -> Tensor:
    """True where a response is distilled [N].

    Args:
        correct_N: whether the verifier found the answer correct (bool); the reward itself does not matter.
        mask: `none` distils all responses; `response` only the incorrect ones; `group` only those of groups without a
            correct response.
    """
    if mask == "none":
        return torch.ones_like(correct_N, dtype=torch.bool)
    if mask == "response":
        return ~correct_N
    if mask == "group":
        groups, index_N = group_ids_N.unique(return_inverse=True)
        num_correct = torch.zeros(len(groups), dtype=torch.long).scatter_add(0, index_N, correct_N.long())
        return num_correct[index_N] == 0
    raise ValueError(f"mask must be none, response or group, not {mask}")
