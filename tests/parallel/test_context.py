"""Attention over context-parallel ranks equals a masked softmax over whole sequences: values and gradients, in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kdrl_mcore.parallel.packing import pack
from tests.support.ranks import RankPool
from tests.support.varlen import varlen_attn

HEADS, GROUPS, DIMENSION = 6, 2, 5
BATCHES = {
    "one sequence": [(3, 28)],
    "equal sequences": [(4, 4), (4, 4), (5, 3), (2, 6)],
    "uneven sequences": [(1, 1), (9, 2), (1, 30), (3, 4), (3, 4)],
    "nothing but filler": [],
}


def packed_on_rank(lengths: list[tuple[int, int]], rank: int, size: int) -> Any:
    sequences = [(i, np.ones(prompt, np.int64), np.ones(response, np.int64)) for i, (prompt, response) in enumerate(lengths)]
    return pack(sequences, 2 * size, context_rank=rank, context_size=size)


def inputs(rows: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, for the whole packed sequence."""
    generator = torch.Generator().manual_seed(7)
    heads = (HEADS, GROUPS, GROUPS, HEADS)
    return [torch.randn(rows, number, DIMENSION, dtype=torch.float64, generator=generator) for number in heads]


def attend_on_rank(lengths: list[tuple[int, int]], kernel: str) -> list[Tensor]:
    """This rank's rows of the output and of the gradients of queries, keys and values."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist

    from kdrl_mcore.model.attention import PackedDotProductAttention, PackedSequences, varlen
    from kdrl_mcore.parallel.context import ContextShard

    rank, size = dist.get_rank(), dist.get_world_size()
    batch = packed_on_rank(lengths, rank, size)
    order = batch.context_rows
    mine = order.view(size, -1)[rank]
    query, key, value, gradient = (x[mine] for x in inputs(len(order)))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    packed = PackedSequences(runs=batch.runs, context=ContextShard(dist.group.WORLD, order))
    if kernel == "varlen":
        with patch("torch.nn.attention.varlen.varlen_attn", varlen_attn):
            packed.varlen = varlen._torch_varlen()
        packed.stretches = varlen.stretches(batch.runs)
    attention = PackedDotProductAttention(None, softmax_scale=0.4)
    output = attention(query, key, value, None, packed_seq_params=packed)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def plain_attention(lengths: list[tuple[int, int]], size: int) -> list[Tensor]:
    """The same for all rows, by a softmax over the scores that a mask keeps."""
    ranks = [packed_on_rank(lengths, rank, size) for rank in range(size)]
    order = ranks[0].context_rows
    positions = torch.empty_like(order).index_copy_(0, order, torch.cat([batch.positions_S for batch in ranks]))
    sequence, row = (positions == 0).cumsum(0), torch.arange(len(order))
    visible = (sequence[:, None] == sequence[None]) & (row[None] <= row[:, None])
    query, key, value, gradient = inputs(len(order))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    every_head = [x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value)]
    scores = 0.4 * torch.einsum("qhd,khd->hqk", query, every_head[0])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    output = torch.einsum("hqk,khd->qhd", weights, every_head[1])
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=list(BATCHES))
def test_attention_over_context_ranks(
    lengths: list[tuple[int, int]], ranks: int, kernel: str, pools: dict[int, RankPool]
) -> None:
    found = pools[ranks].run(attend_on_rank, lengths, kernel)
    order = packed_on_rank(lengths, 0, ranks).context_rows
    compared = zip(("output", "dQ", "dK", "dV"), zip(*found, strict=True), plain_attention(lengths, ranks), strict=True)
    for name, parts, expected in compared:
        torch.testing.assert_close(
            torch.cat(parts), expected[order], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
