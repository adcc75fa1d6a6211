"""Context parallelism: the ranks that share one packed micro-batch, and the gather of all their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.parallel.collectives import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class ContextShard:
    """This rank's part of a packed sequence.

    Attributes:
        group: the ranks that share the sequence.
        rows_F: indices of the packed sequence's rows in the order in which the ranks hold them, rank after rank.
    """

    group: dist.ProcessGroup
    rows_F: Tensor

    def gather(self, local: Tensor) -> Tensor:
        """All ranks' rows [F, ...] in the order of the packed sequence, from this rank's [F / ranks, ...].

        Collectives over the group: an all-gather, and in the backward pass a reduce-scatter (each row gets the sum of all
        ranks' gradients).
        """
        return _Gather.apply(local, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: ContextShard) -> Tensor:
        ctx.shard = shard
        gathered = local.new_empty(local.size(0) * shard.group.size(), *local.shape[1:])
        all_gather_single(gathered, local.contiguous(), group=shard.group)
        return torch.empty_like(gathered).index_copy_(0, shard.rows_F, gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        shard: ContextShard = ctx.shard
        by_rank = gradients[0].index_select(0, shard.rows_F)
        local = by_rank.new_empty(by_rank.size(0) // shard.group.size(), *by_rank.shape[1:])
        reduce_scatter_single(local, by_rank, group=shard.group)
        return local, None
