"""Collectives that torch 2.13 renamed, under their new names for every torch from 2.6 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output [R*N, ...], input [N, ...], group=None): the inputs of all R ranks of the group, in rank order."""
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(output [N, ...], input [R*N, ...], group=None): this rank's part of the sum over the R ranks of the group."""
