"""Reward-guided masks: which responses are distilled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_mcore.objective.functions import find_function


def distillation_mask(correct_N: Tensor, group_ids_N: Tensor, mask: str) -> Tensor:
    """True where a response is distilled [N].

    Args:
        correct_N: whether the verifier found the answer correct (bool); the reward itself does not matter.
        mask: one of `MASKS`, or MODULE:NAME, a user's function.
    """
    return find_function("objective.kd.mask", mask, MASKS)(correct_N, group_ids_N)


def none(correct_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """All."""
    return torch.ones_like(correct_N, dtype=torch.bool)


def response(correct_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """The incorrect ones."""
    return ~correct_N


def group(correct_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """Those of groups without a correct response."""
    groups, index_N = group_ids_N.unique(return_inverse=True)
    num_correct = torch.zeros(len(groups), dtype=torch.long).scatter_add(0, index_N, correct_N.long())
    return num_correct[index_N] == 0


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {mask.__name__: mask for mask in (none, response, group)}
"""The masks by the names of `objective.kd.mask`: (whether each response is correct, its group) -> whether it is distilled."""
