"""The weight map at work: which slices of which HF tensors make up one rank's shard of one Megatron parameter.

Every use (import, loading into a running trainer, export, verification, refit) walks the same list of pieces, in one
direction or the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kdrl_mcore.convert.extent import ByteRange, Files
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, WeightRule


class Weights(Protocol):
    """The weights of a model on disk under their HF names, whatever the format."""

    path: Path
    names: frozenset[str]
    files: Files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""

    def read(self, name: str, start: int, length: int, dim: int = 0) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of a tensor, in its dtype."""

    def ranges(self, name: str, start: int, length: int) -> list[ByteRange] | None:
        """Where the bytes of these rows lie, in order; None if they are not whole rows anywhere."""


@dataclass(frozen=True)
class Piece:
    """`length` rows (or columns) of HF tensor `hf`, from `hf_start`, standing at `start` in the shard, along dimension
    `dim`."""

    hf: str
    hf_start: int
    start: int
    length: int
    dim: int


def hf_shapes(rule: WeightRule, architecture: Architecture) -> list[tuple[int, ...]]:
    """The shape of each HF tensor of a rule."""
    hidden, head = architecture.hidden_size, architecture.head_dim
    query, kv = architecture.num_attention_heads * head, architecture.num_key_value_heads * head
    ffn = architecture.experts.ffn_hidden_size if rule.is_expert and architecture.experts else architecture.ffn_hidden_size
    rows_or_columns: dict[str, list[tuple[int, ...]]] = {
        "vocabulary": [(architecture.vocab_size, hidden)],
        "gate_up": [(ffn, hidden)] * 2,
    }
    if rule.kind in rows_or_columns:
        return rows_or_columns[rule.kind]
    if rule.megatron.endswith("mlp.router.weight") and architecture.experts:
        return [(architecture.experts.count, hidden)]
    if rule.kind == "qkv":
        return [(rows,) if rule.megatron.endswith("bias") else (rows, hidden) for rows in (query, kv, kv)]
    if rule.kind == "row":
        return [(hidden, query if "linear_proj" in rule.megatron else ffn)]
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


@dataclass(frozen=True)
class GlobalTensor:
    """One whole Megatron tensor (of one layer, of one expert) as Megatron's own checkpoints hold it.

    Attributes:
        key: the name; tensors of all layers (and experts) share it, stacked on leading axes.
        position: where this one stands on the leading axes: (), (layer,) or (layer, expert).
        grid: the sizes of the leading axes.
        shape: without the leading axes.
        hf_names, hf_shapes: the HF tensors it is made of.
        pieces: which rows of which HF tensor stand where.
    """

    key: str
    position: tuple[int, ...]
    grid: tuple[int, ...]
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]


def global_tensors(rules: list[WeightRule], architecture: Architecture) -> Iterator[GlobalTensor]:
    """Every tensor of a model, layer by layer."""
    count = architecture.experts.count if architecture.experts else 1
    for layer in range(architecture.num_layers):
        for rule in rules:
            layered = "{layer}" in rule.megatron
            if not layered and layer > 0:
                continue
            shapes = tuple(hf_shapes(rule, architecture))
            rows = sum(shape[0] for shape in shapes)
            for expert in range(count) if rule.is_expert else (0,):
                names = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
                single = len(names) == 1  # then the Megatron tensor is the HF tensor
                whole = [Piece(names[0], 0, 0, rows, 0)] if single else pieces(rule, names, architecture, 0, 1, rows)
                yield GlobalTensor(
                    key=_checkpoint_key(rule, architecture),
                    position=(layer, expert)[: layered + rule.is_expert],
                    grid=(architecture.num_layers, count)[: layered + rule.is_expert],
                    shape=(rows, *shapes[0][1:]),
                    hf_names=names,
                    hf_shapes=shapes,
                    pieces=tuple(whole),
                )


def _checkpoint_key(rule: WeightRule, architecture: Architecture) -> str:
    """The name in Megatron's checkpoints: without layer and expert numbers, and with each norm where Transformer Engine keeps
    it, fused into the linear layer behind it (before experts there is none)."""
    key = rule.megatron.replace(".{layer}", "").replace("local_experts.{expert}", "experts")
    key = key.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    if architecture.experts is None:
        key = key.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    return key


def check_names(weights: Weights, architecture: Architecture, rules: list[WeightRule]) -> None:
    """Compare a checkpoint's tensors with what its architecture has.

    Raises:
        ModelError: a tensor is missing, unexpected, or has another shape.
    """
    expected = {name: None for tensor in global_tensors(rules, architecture) for name in tensor.hf_names}
    missing = [name for name in expected if name not in weights.names]
    if missing:
        raise ModelError(f"{weights.path} has no tensor {missing[0]} ({len(missing)} missing in all)")
    # Tied heads may be stored twice, and old exports stored computed buffers.
    known = {"lm_head.weight"} if architecture.tied_embeddings else set()
    unexpected = sorted(name for name in weights.names - set(expected) - known if not name.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise ModelError(f"{weights.path} has a tensor its architecture does not: {unexpected[0]} ({len(unexpected)} such)")
    check_shapes(weights, architecture, rules)


def check_shapes(weights: Weights, architecture: Architecture, rules: list[WeightRule]) -> None:
    """Compare the shapes of the tensors that are there with those its architecture has.

    Raises:
        ModelError: one has another shape.
    """
    for tensor in global_tensors(rules, architecture):
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True):
            if name in weights.names and weights.shape(name) != shape:
                raise ModelError(f"{weights.path}: {name} has shape {weights.shape(name)}, its config.json says {shape}")
