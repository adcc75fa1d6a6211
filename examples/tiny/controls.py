"""Controls of a study: functions that a configuration names as MODULE:NAME, in place of the project's own.

Each chooses as much as a rule of the project does, at random: what a method gains over its control, it owes to what it chooses.
The choice is drawn from what is given, so it is the same in every layout and when a run is resumed.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from kdrl_mcore.config import TokenWeightConfig
from kdrl_mcore.objective.token_weights import ResponseScores
from kdrl_mcore.types import TokenFloats


def random_responses(correct_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """As many responses as are incorrect, drawn from all: the control of `objective.kd.mask=response`."""
    order = _generator(correct_N.numpy(), group_ids_N.numpy()).permutation(len(correct_N))
    return ~correct_N[torch.from_numpy(order)]


def random_groups(correct_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """As many groups as have no correct response, drawn from all: the control of `objective.kd.mask=group`."""
    groups, index_N = group_ids_N.unique(return_inverse=True)
    unsolved = torch.ones(len(groups), dtype=torch.bool)
    unsolved[index_N[correct_N]] = False
    order = _generator(correct_N.numpy(), group_ids_N.numpy()).permutation(len(groups))
    return unsolved[torch.from_numpy(order)][index_N]


def random_tokens(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """As many tokens as `objective.kd.token_weight.kind=entropy` chooses, drawn from all."""
    assert response.log_ratio is not None
    first = int(np.ceil(settings.share * response.tokens - 1e-9))
    second = int(np.ceil(settings.more * (response.tokens - first) - 1e-9))
    chosen = _generator(response.log_ratio).permutation(response.tokens) < first + second
    return chosen.astype(np.float32)


def _generator(*values: np.ndarray) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(np.ascontiguousarray(each).tobytes()) for each in values])
