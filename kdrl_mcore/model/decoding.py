"""A decoding step: one token of every sequence through a model chunk's layers.

It gives the same result as the modules, with their weights and over their groups, in fewer operations: Megatron-Core's modules
prepare for gradients, recompute and overlap, which costs as much time as the matrix products of a few rows. Every
tensor-parallel rank has all rows, under sequence parallelism as well: splitting so few would save nothing.

N rows (one per sequence, and padding), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.model.attention import PackedSequences
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.model.linear import ColumnParallel, RowParallel
from kdrl_mcore.model.lora import ADAPTER
from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.parallel.layout import ModelGroups


def can_decode(chunk: LanguageModel) -> bool:
    """Whether `decode` supports this chunk: its linear layers are ours, not Transformer Engine's, and have no adapters."""
    linear_layers = [layer.self_attention.linear_qkv for layer in chunk.decoder.layers]
    adapted = any(hasattr(module, ADAPTER) for module in chunk.decoder.modules())
    return not adapted and all(isinstance(each, ColumnParallel) for each in linear_layers)


def decode(
    chunk: LanguageModel, groups: ModelGroups, tokens_N: Tensor, hidden_NH: Tensor | None, packed: PackedSequences
) -> Tensor:
    """Run one token of each sequence through this chunk, without gradients.

    Args:
        hidden_NH: the output of the previous chunk; None for the first.
        packed: the positions and the cache, whose `begin_decoding` has been called.

    Returns:
        Hidden states [N, H], normalised after the last layer of the model. Collectives over the tensor-parallel group: a SUM
        all-reduce after attention and one after each MLP, and those of the embedding and of experts.
    """
    if hidden_NH is None:
        embedded: Tensor = chunk.embedding(input_ids=tokens_N[None], position_ids=None)
        hidden_NH = _whole(embedded.squeeze(1), groups)
    for layer in chunk.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        context = attention.decode(layer.input_layernorm(hidden_NH), packed)
        output = _sum(attention.linear_proj.product(context), groups)
        hidden_NH = layer.self_attn_bda(False, False)((output, attention.linear_proj.bias), hidden_NH, 0.0)
        branch = _feed_forward(mlp, layer.pre_mlp_layernorm(hidden_NH), groups)
        hidden_NH = layer.mlp_bda(False, False)(branch, hidden_NH, 0.0)
    if chunk.decoder.final_layernorm is not None:
        hidden_NH = chunk.decoder.final_layernorm(hidden_NH)
    return chunk._postprocess(hidden_NH)


def _feed_forward(mlp: Any, x_NH: Tensor, groups: ModelGroups) -> tuple[Tensor, Tensor | None]:
    """The output of an MLP or of a mixture of experts, and the bias that is still to be added. Under sequence parallelism each
    rank routes its own rows to the experts."""
    if hasattr(mlp, "linear_fc1"):
        gate, up = mlp.linear_fc1.product(x_NH).chunk(2, dim=-1)
        return _sum(mlp.linear_fc2.product(mlp.config.activation_func(gate).mul_(up)), groups), mlp.linear_fc2.bias
    if groups.layout.sequence_parallel:
        x_NH = x_NH.chunk(groups.tensor.size())[groups.tensor.rank()]
    output, bias = mlp(x_NH[:, None])
    return _whole(output.squeeze(1), groups), bias


def _sum(x_NH: Tensor, groups: ModelGroups) -> Tensor:
    """Sum over the tensor-parallel group, in place."""
    if groups.layout.tensor > 1:
        dist.all_reduce(x_NH, group=groups.tensor)
    return x_NH


def _whole(x: Tensor, groups: ModelGroups) -> Tensor:
    """The rows of all tensor-parallel ranks, which under sequence parallelism are gathered."""
    if not groups.layout.sequence_parallel:
        return x
    whole = x.new_empty(len(x) * groups.tensor.size(), x.size(1))
    all_gather_single(whole, x.contiguous(), group=groups.tensor)
    return whole


def pack_weights(chunks: Iterable[LanguageModel]) -> None:
    """Make a copy of every large weight of the linear layers and the output head that is faster to multiply by, on CPUs where
    this helps. Copies do not follow their weights: no weight may be updated before `unpack_weights`."""
    for chunk in chunks:
        for module in _linear_layers(chunk):
            module.pack_weight()
        chunk.pack_head()


def unpack_weights(chunks: Iterable[LanguageModel]) -> None:
    """Drop the copies."""
    for chunk in chunks:
        for module in _linear_layers(chunk):
            module.unpack_weight()
        chunk.unpack_head()


def _linear_layers(chunk: LanguageModel) -> Iterator[ColumnParallel | RowParallel]:
    for module in chunk.decoder.modules():
        if isinstance(module, (ColumnParallel, RowParallel)):
            yield module
