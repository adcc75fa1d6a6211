"""Collectives among the ranks that share a vocabulary. With a single rank every function returns its argument.
Empty tensors are not communicated: all ranks of a group always have the same number of tokens.

C tokens, K numbers per token, R ranks, S rows of the sequence, H hidden.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.parallel.collectives import all_gather_single, reduce_scatter_single
from kdrl_mcore.vocab_parallel.shard import VocabShard


def sum_over_ranks(value: Tensor, shard: VocabShard) -> Tensor:
    """One SUM all-reduce over the shard's group, in place."""
    if shard.ranks > 1 and value.numel():
        dist.all_reduce(value, group=shard.group)
    return value


def max_over_ranks(value: Tensor, shard: VocabShard) -> Tensor:
    """One MAX all-reduce over the shard's group, in place."""
    if shard.ranks > 1 and value.numel():
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=shard.group)
    return value


def gather_columns(value_CK: Tensor, shard: VocabShard) -> Tensor:
    """Concatenate the ranks' [C, K] in rank order to [C, R*K]. One all-gather over the shard's group."""
    if shard.ranks == 1:
        return value_CK
    gathered_RCK = value_CK.new_empty(shard.ranks, *value_CK.shape)
    if value_CK.numel():
        all_gather_single(gathered_RCK.flatten(0, 1), value_CK.contiguous(), group=shard.group)
    return gathered_RCK.transpose(0, 1).flatten(1)


def gather_sequence(value_SH: Tensor, shard: VocabShard) -> Tensor:
    """Concatenate the rows of all ranks in rank order. One all-gather over the shard's group."""
    if shard.ranks == 1:
        return value_SH
    gathered = value_SH.new_empty(value_SH.size(0) * shard.ranks, value_SH.size(1))
    if value_SH.numel():
        all_gather_single(gathered, value_SH.contiguous(), group=shard.group)
    return gathered


def reduce_scatter_sequence(value_SH: Tensor, shard: VocabShard) -> Tensor:
    """This rank's rows of the sum over ranks. One reduce-scatter over the shard's group."""
    if shard.ranks == 1:
        return value_SH
    part = value_SH.new_empty(value_SH.size(0) // shard.ranks, value_SH.size(1))
    if value_SH.numel():
        reduce_scatter_single(part, value_SH.contiguous(), group=shard.group)
    return part
