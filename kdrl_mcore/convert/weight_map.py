"""The weight map applied: which slices of which HF tensors make up one rank's shard of one Megatron parameter.

Import, loading into a running trainer, export, verification and refit all walk the same list of slices, in one direction or
the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kdrl_mcore.convert.byte_ranges import ByteRange, Files
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, WeightRule

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_BYTES = 2**25  # of each of the two tensors held at a time


class Weights(Protocol):
    """The weights of a model on disk under their HF names, independent of the file format."""

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
        """Where the bytes of these rows lie, in order; None if they are not stored as whole rows."""


@dataclass(frozen=True)
class TensorSlice:
    """`length` rows (or columns) of the HF tensor `hf`, from `hf_start`, which lie at `start` in the shard, along dimension
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
    ffn, experts = architecture.ffn_hidden_size, architecture.experts
    if experts is not None and rule.is_expert:
        ffn = experts.ffn_hidden_size
    elif experts is not None and ".shared_experts." in rule.megatron:
        ffn = experts.shared_ffn_hidden_size
    rows_or_columns: dict[str, list[tuple[int, ...]]] = {
        "vocabulary": [(architecture.vocab_size, hidden)],
        "gate_up": [(ffn, hidden)] * 2 if len(rule.hf) == 2 else [(2 * ffn, hidden)],
    }
    if rule.kind in rows_or_columns:
        return rows_or_columns[rule.kind]
    if rule.megatron.endswith(("mlp.router.weight", "mlp.router.expert_bias")) and architecture.experts:
        return [(architecture.experts.count, hidden)[: 2 if rule.megatron.endswith("weight") else 1]]
    if rule.kind == "qkv":
        heights = (query, kv, kv) if len(rule.hf) == 3 else (query + 2 * kv,)
        return [(rows,) if rule.megatron.endswith("bias") else (rows, hidden) for rows in heights]
    if rule.kind == "row":
        return [(hidden, query if "linear_proj" in rule.megatron else ffn)]
    if rule.megatron.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        width = query if "q_layernorm" in rule.megatron else kv
        return [(width if architecture.qk_norm_of_all_heads else head,)]
    return [(hidden,)]


def tensor_slices(
    rule: WeightRule, hf_names: tuple[str, ...], architecture: Architecture, rank: int, ranks: int, shard_size: int
) -> list[TensorSlice]:
    """The slices that make up the shard of tensor-parallel rank `rank` of `ranks`.

    Args:
        shard_size: the shard's size along the split dimension, padding included.
    """
    shapes = hf_shapes(rule, architecture)
    if rule.kind == "replicated":
        return [TensorSlice(hf_names[0], 0, 0, shapes[0][0], 0)]
    if rule.kind == "row":
        return [TensorSlice(hf_names[0], rank * shard_size, 0, shard_size, 1)]
    if rule.kind == "gate_up":
        half = sum(shape[0] for shape in shapes) // 2
        share = half // ranks
        sources = [(hf_names[0], 0), (hf_names[1], 0) if len(hf_names) == 2 else (hf_names[0], half)]
        return [TensorSlice(name, first + rank * share, index * share, share, 0) for index, (name, first) in enumerate(sources)]
    if rule.kind in ("column", "vocabulary"):
        begin = rank * shard_size
        length = max(0, min(shard_size, shapes[0][0] - begin))
        return [TensorSlice(hf_names[0], begin, 0, length, 0)] if length else []
    # qkv: the full matrix stacks, group by group, the group's queries, its key and its value; the shard is a range of its rows.
    head, groups = architecture.head_dim, architecture.num_key_value_heads
    query, kv = architecture.num_attention_heads * head, groups * head
    starts = (0, 0, 0) if len(hf_names) == 3 else (0, query, query + kv)  # of query, key and value in their HF tensors
    widths = (architecture.num_attention_heads // groups * head, head, head)
    begin, end, row = rank * shard_size, (rank + 1) * shard_size, 0
    result = []
    for group in range(groups):
        for name, first, width in zip(hf_names * (3 // len(hf_names)), starts, widths, strict=True):
            low, high = max(row, begin), min(row + width, end)
            if low < high:
                result.append(TensorSlice(name, first + group * width + low - row, low - begin, high - low, 0))
            row += width
    return result


@dataclass(frozen=True)
class GlobalTensor:
    """One whole Megatron tensor (of one layer, of one expert) as Megatron's own checkpoints hold it.

    Attributes:
        key: the name, shared by the tensors of all layers (and experts), which are stacked along leading axes. Where some
            layers have experts and others do not, Megatron-Core does not stack layers: their numbers are in the names.
        position: this tensor's index along the leading axes: (), (layer,), (layer, expert) or (expert,).
        grid: the sizes of the leading axes.
        shape: the shape without the leading axes.
        hf_names, hf_shapes: the HF tensors it is made of.
        slices: where the rows of each HF tensor lie in it.
        keeps_dtype: see `WeightRule`.
    """

    key: str
    position: tuple[int, ...]
    grid: tuple[int, ...]
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    slices: tuple[TensorSlice, ...]
    keeps_dtype: bool = False


def global_tensors(rules: list[WeightRule], architecture: Architecture) -> Iterator[GlobalTensor]:
    """Every tensor of a model, layer by layer."""
    count, stacked = architecture.experts.count if architecture.experts else 1, not architecture.mixes_layers
    for layer in range(architecture.num_layers):
        for rule in rules:
            layered = "{layer}" in rule.megatron
            if (not layered and layer > 0) or (rule.layers is not None and layer not in rule.layers):
                continue
            axes = [0] * (layered and stacked) + [1] * rule.is_expert
            shapes = tuple(hf_shapes(rule, architecture))
            rows = sum(shape[0] for shape in shapes)
            for expert in range(count) if rule.is_expert else (0,):
                names = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
                single = len(names) == 1 and rule.kind != "qkv"  # then the Megatron tensor is the HF tensor
                whole = [TensorSlice(names[0], 0, 0, rows, 0)]
                if not single:
                    whole = tensor_slices(rule, names, architecture, 0, 1, rows)
                yield GlobalTensor(
                    key=_checkpoint_key(rule, architecture, layer),
                    position=tuple((layer, expert)[axis] for axis in axes),
                    grid=tuple((architecture.num_layers, count)[axis] for axis in axes),
                    shape=(rows, *shapes[0][1:]),
                    hf_names=names,
                    hf_shapes=shapes,
                    slices=tuple(whole),
                    keeps_dtype=rule.keeps_dtype,
                )


def _checkpoint_key(rule: WeightRule, architecture: Architecture, layer: int) -> str:
    """The name in Megatron's checkpoints: without the numbers of what is stacked, and with each norm's weight in the linear
    layer that follows it, where Transformer Engine keeps it (except before experts)."""
    key = rule.megatron.replace(".{layer}", f".{layer}" if architecture.mixes_layers else "")
    key = key.replace("local_experts.{expert}", "experts")
    key = key.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    if not architecture.has_experts(layer):
        key = key.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    return key


def check_names(weights: Weights, architecture: Architecture, rules: list[WeightRule]) -> None:
    """Compare a checkpoint's tensors with those of its architecture.

    Raises:
        ModelError: a tensor is missing, unexpected or has the wrong shape, or a head stored along with tied embeddings differs
            from them.
    """
    expected = {name: None for tensor in global_tensors(rules, architecture) for name in tensor.hf_names}
    missing = [name for name in expected if name not in weights.names]
    if missing:
        raise ModelError(f"{weights.path} has no tensor {missing[0]} ({len(missing)} missing in all)")
    # Tied weights may also be stored as the head, and old exports stored computed buffers.
    known = {HEAD} if architecture.tied_embeddings else set()
    unexpected = sorted(name for name in weights.names - set(expected) - known if not name.endswith("rotary_emb.inv_freq"))
    unexpected = [name for name in unexpected if not architecture.keeps(name)]
    unexpected += getattr(weights, "unexpected_keys", [])
    if unexpected:
        raise ModelError(
            f"{weights.path} has a tensor that its architecture does not have: {unexpected[0]} ({len(unexpected)} in all)"
        )
    check_shapes(weights, architecture, rules)
    if architecture.tied_embeddings:
        check_tied_head(weights)


def check_tied_head(weights: Weights) -> None:
    """Check that a head stored along with tied embeddings is a second copy of them. Reads both.

    Raises:
        ModelError: it is not. `transformers` would then use the head, vLLM would not, and the config agrees with vLLM.
    """
    if HEAD not in weights.names:
        return
    shape = weights.shape(EMBEDDING)
    rows = max(1, _COMPARED_BYTES // (4 * shape[1]))
    same = weights.shape(HEAD) == shape and all(
        torch.equal(
            weights.read(HEAD, row, min(rows, shape[0] - row)).float(),
            weights.read(EMBEDDING, row, min(rows, shape[0] - row)).float(),
        )
        for row in range(0, shape[0], rows)
    )
    if not same:
        raise ModelError(
            f"{weights.path} holds {HEAD}, which differs from the embeddings, but config.json has tie_word_embeddings=true: "
            f"set that to false if the head is the trained one, or remove {HEAD}"
        )


def check_shapes(weights: Weights, architecture: Architecture, rules: list[WeightRule]) -> None:
    """Compare the shapes of the tensors present with those of the architecture.

    Raises:
        ModelError: the shape of a tensor differs.
    """
    for tensor in global_tensors(rules, architecture):
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True):
            if name in weights.names and weights.shape(name) != shape:
                raise ModelError(f"{weights.path}: {name} has shape {weights.shape(name)}, but its config.json gives {shape}")
