"""LoRA (https://arxiv.org/abs/2106.09685): low-rank adapters of a frozen model's linear layers.

y = x W^T + (alpha / rank) x A^T B^T for each adapted projection, A [rank, in] and B [out, rank]; only A and B are trained. Our
layers fuse query, key and value, and gate and up. Each projection has separate factors, as in `peft`; a fused layer multiplies
by all its A's as one matrix, and by all its B's as one.

Tensor parallelism splits a column-parallel layer's B by rows and a row-parallel layer's A by columns. Every rank holds the
other factor whole, and the ranks sum its gradient once per update (`sum_shared_gradients`). In a pass over the model:

- a row-parallel layer (o_proj, down_proj) adds its adapter's output before its all-reduce or reduce-scatter: nothing else is
  communicated;
- a column-parallel layer (q_proj, k_proj, v_proj, gate_proj, up_proj) without sequence parallelism adds the adapter's input
  gradient before its all-reduce: nothing else is communicated;
- with sequence parallelism such a layer computes x A^T from this rank's tokens, then gathers it: `rank` values per token and
  projection, in addition to the layer's gather of the hidden states, and as many in a reduce-scatter of the backward pass. In
  return the adapter keeps only this rank's tokens for the backward pass, not those of all ranks.

S tokens; K inputs and N outputs of a layer on this rank; R the adapters' rank; P adapted projections of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import FAMILIES
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.layout import ModelGroups

ADAPTER, TEACHER_ADAPTER = "lora", "teacher_lora"
"""The names, among the submodules of a linear layer, of the adapter that is trained and of the one that teaches."""


@dataclass(frozen=True)
class AdaptableLinear:
    """One of the linear layers of a transformer layer that can have adapters.

    Attributes:
        path: its name in Megatron-Core's transformer layer.
        projections: the projections that it consists of.
        is_row: whether it is row-parallel; otherwise it is column-parallel.
        hf: the module of an HF layer that holds the projections.
    """

    path: str
    projections: tuple[str, ...]
    is_row: bool
    hf: str


QKV = AdaptableLinear("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj"), False, "self_attn")
ATTENTION_LINEARS = (QKV, AdaptableLinear("self_attention.linear_proj", ("o_proj",), True, "self_attn"))
MLP_LINEARS = (
    AdaptableLinear("mlp.linear_fc1", ("gate_proj", "up_proj"), False, "mlp"),
    AdaptableLinear("mlp.linear_fc2", ("down_proj",), True, "mlp"),
)
ADAPTABLE_LINEARS = (*ATTENTION_LINEARS, *MLP_LINEARS)


class Factors(nn.Module):
    """This rank's share of one projection's A and B.

    Attributes:
        a: [R, K], split by columns in a row-parallel layer.
        b: [rows, R], split by rows in a column-parallel layer.
        inputs, outputs: the sizes of the whole projection.
        hf_name: the projection's name in the HF model.
    """

    def __init__(self, a: Tensor, b: Tensor, inputs: int, outputs: int, hf_name: str, *, is_row: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.inputs, self.outputs, self.hf_name, self.is_row = inputs, outputs, hf_name, is_row
        split = self.a if is_row else self.b
        set_tensor_model_parallel_attributes(tensor=split, is_parallel=True, dim=1 if is_row else 0, stride=1)

    @property
    def shared(self) -> nn.Parameter:
        """The factor that every tensor-parallel rank holds whole, with a part of its gradient."""
        return self.b if self.is_row else self.a


class Adapter(nn.Module):
    """The adapters of one linear layer.

    Attributes:
        enabled: whether they are added to the layer's output; otherwise the layer is the frozen model's.
    """

    def __init__(
        self,
        linear: Any,
        kind: AdaptableLinear,
        layer: int,
        lora: LoraConfig,
        architecture: Architecture,
        groups: ModelGroups,
        name: str = ADAPTER,
    ) -> None:
        """Attach uninitialised adapters to the layer, and take over its collectives where that saves some.

        Args:
            linear: the layer: Megatron-Core's, ours or Transformer Engine's.
            kind: which of a transformer layer's linear layers it is.
            layer: the number of the transformer layer.
            name: `ADAPTER`, or `TEACHER_ADAPTER` for frozen ones, which are disabled at first.
        """
        super().__init__()
        self.scale, self.enabled, self.name = lora.alpha / lora.rank, name == ADAPTER, name
        self._group, self._is_row = groups.tensor, kind.is_row
        self._splits_tokens = groups.layout.sequence_parallel
        weight: Tensor = linear.weight
        ranks, outputs = groups.tensor.size(), weight.size(0)
        rows = {p: each for p, each in _rows_of(kind, architecture, outputs).items() if p in lora.target_modules}
        for projection, own in rows.items():
            factors = Factors(
                weight.new_empty(lora.rank, weight.size(1)),
                weight.new_empty(len(own), lora.rank),
                weight.size(1) * (ranks if kind.is_row else 1),
                len(own) * (1 if kind.is_row else ranks),
                f"model.layers.{layer}.{kind.hf}.{projection}",
                is_row=kind.is_row,
            )
            self.add_module(projection, factors)
        self._shape = (outputs, len(rows), lora.rank)
        row_indices = [torch.tensor(own) for own in rows.values()]
        projection_of_row = [torch.full((len(own),), index) for index, own in enumerate(rows.values())]
        whole = len(rows) == 1 and len(row_indices[0]) == outputs
        self._rows = None if whole else (torch.cat(row_indices), torch.cat(projection_of_row))
        setattr(linear, name, self)
        if not hasattr(linear, "adapted_output"):
            linear.adapted_output = _Sum(linear, groups, is_row=kind.is_row)
        linear.adapted_output.adapters.append(self)

    @property
    def factors(self) -> list[Factors]:
        """The factors of each projection, in the order of their rows in the layer."""
        return [module for module in self.children() if isinstance(module, Factors)]

    def forward(self, x: Tensor) -> Tensor:
        """scale * x A^T B^T, [S, ..., K] -> [S, ..., N]; in a row-parallel layer, this rank's term of the sum.

        With sequence parallelism a column-parallel layer gathers x A^T over the tensor-parallel group.
        """
        low = F.linear(x, self._all_a()) * self.scale
        if self._splits_tokens and not self._is_row:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self._group)
        return F.linear(low, self._all_b())

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + scale * B A [N, K] in the dtype of W, rounded once."""
        own = weight.to(torch.float32, copy=True)  # leaves the weight unchanged
        return own.addmm_(self._all_b().float(), self._all_a().float(), alpha=self.scale).to(weight.dtype)

    def _all_a(self) -> Tensor:
        """[P R, K]"""
        factors = self.factors
        return factors[0].a if len(factors) == 1 else torch.cat([each.a for each in factors])

    def _all_b(self) -> Tensor:
        """[N, P R]: each row has its projection's B in the columns of that projection, and zeros elsewhere."""
        values = torch.cat([each.b for each in self.factors])
        if self._rows is None:
            return values
        self._rows = tuple(each.to(values.device) for each in self._rows)  # type: ignore[assignment]
        return values.new_zeros(self._shape).index_put(self._rows, values).flatten(1)


class _Sum:
    """A linear layer's output, to which those of its adapters that are enabled are added. It takes over the layer's collectives
    where they can serve both."""

    def __init__(self, linear: Any, groups: ModelGroups, *, is_row: bool) -> None:
        self.adapters: list[Adapter] = []
        self._group, self._is_row, self._splits_tokens = groups.tensor, is_row, groups.layout.sequence_parallel
        if self._group.size() > 1 and (is_row or not self._splits_tokens):
            mcore.leave_out_collectives(linear)
            if not is_row:
                linear.register_forward_pre_hook(self._share_input)
        linear.register_forward_hook(self._add)

    def _share_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the input gradients of the layer and of its adapter be all-reduced together."""
        return (copy_to_tensor_model_parallel_region(args[0], group=self._group), *args[1:])

    def _add(self, _: nn.Module, args: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        output, bias = outputs
        for adapter in self.adapters:
            if adapter.enabled:
                output = output + adapter(args[0])
        if self._is_row and self._group.size() > 1:
            reduce = (
                reduce_scatter_to_sequence_parallel_region if self._splits_tokens else reduce_from_tensor_model_parallel_region
            )
            output = reduce(output.contiguous(), group=self._group)
        return output, bias


def _rows_of(kind: AdaptableLinear, architecture: Architecture, outputs: int) -> dict[str, list[int]]:
    """The rows of each projection in this rank's layer of `outputs` rows."""
    rows = np.arange(outputs)
    if len(kind.projections) == 1:
        parts = [rows]
    elif len(kind.projections) == 2:
        parts = np.split(rows, 2)
    else:  # group by group: its queries, its key, its value
        head = architecture.head_dim
        queries = architecture.num_attention_heads // architecture.num_key_value_heads * head
        parts = np.split(rows.reshape(-1, queries + 2 * head), [queries, queries + head], axis=1)
    return {name: part.flatten().tolist() for name, part in zip(kind.projections, parts, strict=True)}


def check_lora(lora: LoraConfig, architecture: Architecture, tensor: int, key: str = "student.lora") -> None:
    """Raise ConfigError if the architecture cannot have these adapters on `tensor` tensor-parallel ranks.

    Args:
        key: what describes them, for the message.
    """
    of_mlp = [name for kind in MLP_LINEARS for name in kind.projections if name in lora.target_modules]
    if architecture.experts is not None and of_mlp:
        raise ConfigError(
            f"{key}.target_modules: {of_mlp[0]} is an expert's in {architecture.family}, and experts have no adapters: "
            "name only q_proj, k_proj, v_proj and o_proj"
        )
    names = {rule.megatron: rule.hf for rule in FAMILIES[architecture.family].rules(architecture)}
    for kind in ADAPTABLE_LINEARS:
        asked = [name for name in kind.projections if name in lora.target_modules]
        own = tuple(f"model.layers.{{layer}}.{kind.hf}.{name}.weight" for name in kind.projections)
        if asked and names.get(f"decoder.layers.{{layer}}.{kind.path}.weight") != own:
            raise ConfigError(
                f"{key}.target_modules: {architecture.family} has no separate {asked[0]}, so `peft` could not load "
                "its adapter: leave it out"
            )
    if architecture.num_key_value_heads % tensor and {*QKV.projections} & {*lora.target_modules}:
        raise ConfigError(
            f"{key} cannot adapt q_proj, k_proj and v_proj of {architecture.num_key_value_heads} key/value heads with "
            f"parallel.tensor={tensor}, which must divide them: lower it, or name other target_modules"
        )
    size = min(architecture.hidden_size, architecture.num_key_value_heads * architecture.head_dim)
    if lora.rank > size:
        raise ConfigError(
            f"{key}.rank={lora.rank} is more than the {size} rows of the smallest projection: there it would train more "
            "weights than the projection has"
        )


def add_adapters(chunk: Any, lora: LoraConfig, groups: ModelGroups) -> None:
    """Freeze a model chunk and give its layers uninitialised adapters.

    Raises:
        ConfigError: see `check_lora`.
    """
    check_lora(lora, chunk.architecture, groups.tensor.size())
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for kind in ADAPTABLE_LINEARS:
            if {*kind.projections} & {*lora.target_modules}:
                Adapter(layer.get_submodule(kind.path), kind, layer.layer_number - 1, lora, chunk.architecture, groups)
    if chunk.pre_process:
        # Recomputed activations get gradients only if the layer's input requires one.
        chunk.embedding.register_forward_hook(_require_gradient)


def add_teacher_adapters(chunk: Any, lora: LoraConfig, groups: ModelGroups) -> None:
    """Give the layers of a model chunk with frozen weights a second, frozen set of uninitialised adapters, which is off.

    Raises:
        ConfigError: see `check_lora`.
    """
    check_lora(lora, chunk.architecture, groups.tensor.size(), "the adapters of teacher.path")
    for layer in chunk.decoder.layers:
        for kind in ADAPTABLE_LINEARS:
            if {*kind.projections} & {*lora.target_modules}:
                linear, number = layer.get_submodule(kind.path), layer.layer_number - 1
                adapter = Adapter(linear, kind, number, lora, chunk.architecture, groups, TEACHER_ADAPTER)
                adapter.requires_grad_(False).eval()


def _require_gradient(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden


def adapters(chunks: Iterable[nn.Module], name: str = ADAPTER) -> Iterator[Adapter]:
    """Every adapter of some model chunks: those that are trained, or those that teach."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Adapter) and module.name == name)


def factors_by_name(chunk: nn.Module, name: str = ADAPTER) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """Every factor of a model chunk: its name (`HF_NAME.lora_A.weight`, or `lora_B`), this rank's share of it, and the
    dimension along which tensor-parallel ranks split it; None if each rank holds it whole."""
    for adapter in adapters([chunk], name):
        for factors in adapter.factors:
            yield f"{factors.hf_name}.lora_A.weight", factors.a, 1 if factors.is_row else None
            yield f"{factors.hf_name}.lora_B.weight", factors.b, None if factors.is_row else 0


@torch.no_grad()
def initialise_adapters(chunks: Iterable[nn.Module], tensor: dist.ProcessGroup, seed: int) -> None:
    """Set A as `peft` does, uniform in +-1 / sqrt(inputs), and B to zero, so that the model begins as the frozen one. The draws
    are a function of the seed and the projection's name, the same in every layout. No communication."""
    for adapter in adapters(chunks):
        for factors in adapter.factors:
            rng = np.random.default_rng([seed, *factors.hf_name.encode()])
            bound, columns = 1 / math.sqrt(factors.inputs), factors.a.size(1)
            whole = rng.uniform(-bound, bound, (factors.a.size(0), factors.inputs))
            start = tensor.rank() * columns if factors.is_row else 0
            factors.a.copy_(torch.from_numpy(whole[:, start : start + columns]))
            factors.b.zero_()


def sharded_factors(chunk: nn.Module, groups: ModelGroups) -> dict[str, ShardedTensor]:
    """The factors of a model chunk as Megatron's sharded tensors: a tensor for each factor of a projection, divided as
    tensor-parallel ranks split it. They share memory with the parameters."""
    tensor, replica = groups.tensor, groups.replicas.rank()
    state: dict[str, ShardedTensor] = {}
    for name, parameter, dim in factors_by_name(chunk):
        cut = () if dim is None else ((dim, tensor.rank(), tensor.size()),)
        replica_id = (0, tensor.rank() if dim is None else 0, replica)
        state[name] = ShardedTensor.from_rank_offsets(name, parameter, *cut, replica_id=replica_id)
    return state


@torch.no_grad()
def load_factors(chunk: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy what `dist_checkpointing.load` returned for `sharded_factors` into the adapters."""
    for name, parameter, _ in factors_by_name(chunk):
        parameter.copy_(values[name])


@contextmanager
def with_adapters(chunks: Sequence[nn.Module], name: str | None) -> Iterator[None]:
    """A context in which the model computes with the adapters of this name in place of those that are trained; None: with none,
    as the frozen model."""
    trained, others = list(adapters(chunks)), [] if name is None else list(adapters(chunks, name))
    for adapter in (*trained, *others):
        adapter.enabled = adapter.name == name
    try:
        yield
    finally:
        for adapter in (*trained, *others):
            adapter.enabled = adapter.name == ADAPTER


def sum_shared_gradients(chunks: Iterable[nn.Module], tensor: dist.ProcessGroup) -> None:
    """Sum the main gradients of the factors that every tensor-parallel rank holds whole, of which each rank has computed the
    part of its own outputs, inputs or tokens. One all-reduce over the tensor-parallel group."""
    shared = [factors.shared.main_grad for adapter in adapters(chunks) for factors in adapter.factors]  # type: ignore[attr-defined]
    if tensor.size() == 1 or not shared:
        return
    whole = torch.cat([gradient.flatten() for gradient in shared])
    dist.all_reduce(whole, group=tensor)
    for gradient, part in zip(shared, whole.split([each.numel() for each in shared]), strict=True):
        gradient.copy_(part.view_as(gradient))
