"""The weight map at work: which slices of which HF tensors make up one rank's shard of one Megatron parameter.

Every use (import, loading into a running trainer, export, verification, refit) walks the same list of pieces, in one
direction or the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, WeightRule
from kdrl_mcore.model.gpt import LanguageModel

# Transformer Engine fuses each norm into the linear layer behind it and keeps its weight there.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Piece:
    """`length` rows (or columns) of HF tensor `hf`, from `hf_start`, standing at `start` in the shard, along dimension
    `dim`."""

    hf: str
    hf_start: int
    start: int
    length: int
    dim: int


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank with the HF slices it holds; rows that no piece covers are vocabulary padding."""

    name: str
    parameter: nn.Parameter
    rule: WeightRule
    hf_names: tuple[str, ...]
    pieces: tuple[Piece, ...]


def hf_shapes(rule: WeightRule, architecture: Architecture) -> list[tuple[int, ...]]:
    """The shape of each HF tensor of a rule."""
    hidden, head = architecture.hidden_size, architecture.head_dim
    query, kv = architecture.num_attention_heads * head, architecture.num_key_value_heads * head
    rows_or_columns: dict[str, list[tuple[int, ...]]] = {
        "vocabulary": [(architecture.vocab_size, hidden)],
        "gate_up": [(architecture.ffn_hidden_size, hidden)] * 2,
    }
    if rule.kind in rows_or_columns:
        return rows_or_columns[rule.kind]
    if rule.kind == "qkv":
        return [(rows,) if rule.megatron.endswith("bias") else (rows, hidden) for rows in (query, kv, kv)]
    if rule.kind == "row":
        return [(hidden, query if "linear_proj" in rule.megatron else architecture.ffn_hidden_size)]
    return [(head if "_layernorm" in rule.megatron and "self_attention" in rule.megatron else hidden,)]


def pieces(
    rule: WeightRule, hf_names: tuple[str, ...], architecture: Architecture, rank: int, ranks: int, shard_size: int
) -> list[Piece]:
    """The slices that make up the shard of tensor-parallel rank `rank` of `ranks`.

    Args:
        shard_size: the shard's size along the split dimension (with padding).
    """
    shapes = hf_shapes(rule, architecture)
    if rule.kind == "replicated":
        return [Piece(hf_names[0], 0, 0, shapes[0][0], 0)]
    if rule.kind == "row":
        return [Piece(hf_names[0], rank * shard_size, 0, shard_size, 1)]
    if rule.kind == "gate_up":
        share = shapes[0][0] // ranks
        return [Piece(name, rank * share, index * share, share, 0) for index, name in enumerate(hf_names)]
    if rule.kind in ("column", "vocabulary"):
        begin = rank * shard_size
        length = max(0, min(shard_size, shapes[0][0] - begin))
        return [Piece(hf_names[0], begin, 0, length, 0)] if length else []
    # qkv: the full matrix stacks, group by group, the group's queries, its key and its value; the shard is a range of its rows.
    head, groups = architecture.head_dim, architecture.num_key_value_heads
    widths = (architecture.num_attention_heads // groups * head, head, head)
    begin, end, row = rank * shard_size, (rank + 1) * shard_size, 0
    result = []
    for group in range(groups):
        for name, width in zip(hf_names, widths, strict=True):
            low, high = max(row, begin), min(row + width, end)
            if low < high:
                result.append(Piece(name, group * width + low - row, low - begin, high - low, 0))
            row += width
    return result


def map_chunk(chunk: LanguageModel, rules: list[WeightRule], rank: int, ranks: int) -> Iterator[MappedParameter]:
    """Every parameter of a model chunk with its HF slices.

    Raises:
        ModelError: a parameter the map does not know.
    """
    by_name = {rule.megatron: rule for rule in rules}
    tied_copy = chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process
    for name, parameter in chunk.named_parameters():
        layer, generic = _generic_name(chunk, name)
        if tied_copy and generic == "output_layer.weight":
            generic = "embedding.word_embeddings.weight"
        if generic not in by_name:
            raise ModelError(f"no weight rule for the parameter {name}: the family's map is incomplete")
        rule = by_name[generic]
        hf_names = tuple(hf.format(layer=layer) for hf in rule.hf)
        shard_size = parameter.shape[1 if rule.kind == "row" else 0]
        yield MappedParameter(
            generic.format(layer=layer),
            parameter,
            rule,
            hf_names,
            tuple(pieces(rule, hf_names, chunk.architecture, rank, ranks, shard_size)),
        )


def _generic_name(chunk: LanguageModel, name: str) -> tuple[int, str]:
    """(global layer number, the name with `{layer}` in its place and Transformer Engine's names undone)."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not match:
        return 0, name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    return layer, "decoder.layers.{layer}." + _FUSED_NORMS.get(match[2], match[2])
