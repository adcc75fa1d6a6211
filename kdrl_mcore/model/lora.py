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

An expert is whole on one rank, and so are its factors: nothing is communicated, and their gradients are reduced as those of its
weights would be.

The output head's product is a part of the loss, which takes the adapter's B as further columns of the weight
(vocab_parallel/head.py): the collectives of the loss serve both.

S tokens; K inputs and N outputs of a layer on this rank; R the adapters' rank; P adapted projections of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
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
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.model.lora_targets import HEAD, AdaptableLinear, check_lora, check_stages, linears_of_layer, rows_of
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.layout import ModelGroups

ADAPTER, TEACHER_ADAPTER = "lora", "teacher_lora"
"""The names, among the submodules of a linear layer, of the adapter that is trained and of the one that teaches."""


class Factors(nn.Module):
    """This rank's share of one projection's A and B.

    Attributes:
        a: [R, K], split by columns in a row-parallel layer.
        b: [rows, R], split by rows in a column-parallel layer.
        inputs, outputs: the sizes of the whole projection.
        hf_name: the projection's name in the HF model; for an expert's, that of the weight of all experts of the layer.
        expert: for an expert's projection, (its number, the number of experts). Tensor-parallel ranks do not split it.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        inputs: int,
        outputs: int,
        hf_name: str,
        *,
        is_row: bool,
        expert: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.inputs, self.outputs, self.hf_name, self.is_row, self.expert = inputs, outputs, hf_name, is_row, expert
        # Of weights that are not marked as split, Megatron-Core's gradient norm counts only those of tensor-parallel rank 0.
        marked = [self.a if is_row else self.b] if expert is None else [self.a, self.b]
        for factor in marked:
            set_tensor_model_parallel_attributes(tensor=factor, is_parallel=True, dim=1 if factor is self.a else 0, stride=1)
            if expert is not None:
                factor.allreduce = False  # type: ignore[attr-defined]  # as experts' own weights (model/gpt.py)

    @property
    def name(self) -> str:
        """`hf_name`, with the expert's number before the last part."""
        if self.expert is None:
            return self.hf_name
        module, _, projection = self.hf_name.rpartition(".")
        return f"{module}.{self.expert[0]}.{projection}"

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
        weight: Tensor,
        kind: AdaptableLinear,
        layer: int,
        lora: LoraConfig,
        architecture: Architecture,
        groups: ModelGroups,
        name: str = ADAPTER,
        expert: tuple[int, int] | None = None,
    ) -> None:
        """Uninitialised adapters for a layer, to be attached with `attach`.

        Args:
            weight: the layer's weight [N, K] on this rank.
            kind: which of a transformer layer's linear layers it is.
            layer: the number of the transformer layer.
            name: `ADAPTER`, or `TEACHER_ADAPTER` for frozen ones, which are disabled at first.
            expert: see `Factors`.
        """
        super().__init__()
        self.scale, self.enabled, self.name = lora.alpha / lora.rank, name == ADAPTER, name
        # With sequence parallelism each rank has the part of its own tokens; otherwise the output head's A has the whole.
        self.shares_gradient = expert is None and (kind is not HEAD or groups.layout.sequence_parallel)
        self._group, self._is_row = _group_of(kind, groups), kind.is_row
        self._splits_tokens = groups.layout.sequence_parallel and not kind.of_experts
        ranks, outputs, chosen = self._group.size(), weight.size(0), kind.chosen(lora)
        rows = {p: each for p, each in rows_of(kind, architecture, outputs).items() if p in chosen}
        for projection, own in rows.items():
            factors = Factors(
                weight.new_empty(lora.rank, weight.size(1)),
                weight.new_empty(len(own), lora.rank),
                weight.size(1) * (ranks if kind.is_row else 1),
                architecture.vocab_size if kind is HEAD else len(own) * (1 if kind.is_row else ranks),
                f"model.layers.{layer}.{kind.hf}.{projection}" if kind.hf else projection,
                is_row=kind.is_row,
                expert=expert,
            )
            self.add_module(projection, factors)
        self._shape = (outputs, len(rows), lora.rank)
        row_indices = [torch.tensor(own) for own in rows.values()]
        projection_of_row = [torch.full((len(own),), index) for index, own in enumerate(rows.values())]
        whole = len(rows) == 1 and len(row_indices[0]) == outputs
        self._rows = None if whole else (torch.cat(row_indices), torch.cat(projection_of_row))

    @property
    def factors(self) -> list[Factors]:
        """The factors of each projection, in the order of their rows in the layer."""
        return [module for module in self.children() if isinstance(module, Factors)]

    def forward(self, x: Tensor) -> Tensor:
        """scale * x A^T B^T, [S, ..., K] -> [S, ..., N]; in a row-parallel layer, this rank's term of the sum.

        With sequence parallelism a column-parallel layer gathers x A^T over the tensor-parallel group.
        """
        low = self.low(x)
        if self._splits_tokens and not self._is_row:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self._group)
        return F.linear(low, self._all_b())

    def low(self, x: Tensor) -> Tensor:
        """scale * x A^T, [S, ..., K] -> [S, ..., P R], without communication."""
        return F.linear(x, self._all_a()) * self.scale

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


class ExpertAdapters(nn.ModuleList):
    """The adapters of Transformer Engine's layer of all experts of a rank, in their order."""

    @property
    def enabled(self) -> bool:
        """Whether they are added to the layer's output."""
        return bool(self[0].enabled)

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Each expert's adapter on its tokens, which lie in the order of the experts: [S, K] -> [S, N]."""
        return torch.cat([adapter(part) for adapter, part in zip(self, x.split(list(tokens_per_expert)), strict=True)])


def _group_of(kind: AdaptableLinear, groups: ModelGroups) -> dist.ProcessGroup:
    """The group whose ranks split a layer; an expert is whole on one rank."""
    group: dist.ProcessGroup = groups.groups.expt_tp if kind.of_experts else groups.tensor
    return group


def _attach(
    linear: Any,
    kind: AdaptableLinear,
    layer: int,
    lora: LoraConfig,
    architecture: Architecture,
    groups: ModelGroups,
    name: str,
    expert: tuple[int, int] | None = None,
) -> None:
    """Attach uninitialised adapters to a linear layer (Megatron-Core's, ours or Transformer Engine's, also that of several
    experts, of which `expert` is the first), and take over its collectives where that saves some."""
    adapter: Adapter | ExpertAdapters
    if hasattr(linear, "weight"):
        adapter = Adapter(linear.weight, kind, layer, lora, architecture, groups, name, expert)
    else:
        assert expert is not None
        adapter = ExpertAdapters(
            Adapter(weight, kind, layer, lora, architecture, groups, name, (expert[0] + index, expert[1]))
            for index, weight in enumerate(_weights_of_experts(linear))
        )
    setattr(linear, name, adapter)
    if not hasattr(linear, "adapted_output"):
        linear.adapted_output = _Sum(linear, kind, groups)
    linear.adapted_output.adapters.append(adapter)


def _weights_of_experts(linear: Any) -> list[Tensor]:
    return [getattr(linear, f"weight{index}") for index in range(linear.num_gemms)]


class _Sum:
    """A linear layer's output, to which those of its adapters that are enabled are added. It takes over the layer's collectives
    where they can serve both."""

    def __init__(self, linear: Any, kind: AdaptableLinear, groups: ModelGroups) -> None:
        self.adapters: list[Adapter | ExpertAdapters] = []
        self._group, self._is_row = _group_of(kind, groups), kind.is_row
        self._splits_tokens = groups.layout.sequence_parallel
        if self._group.size() > 1 and (kind.is_row or not self._splits_tokens):
            mcore.leave_out_collectives(linear)
            if not kind.is_row:
                linear.register_forward_pre_hook(self._share_input)
        linear.register_forward_hook(self._add)

    def _share_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the input gradients of the layer and of its adapter be all-reduced together."""
        return (copy_to_tensor_model_parallel_region(args[0], group=self._group), *args[1:])

    def _add(self, _: nn.Module, args: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        output, bias = outputs
        for adapter in self.adapters:
            if adapter.enabled:
                output = output + adapter(*args)
        if self._is_row and self._group.size() > 1:
            reduce = (
                reduce_scatter_to_sequence_parallel_region if self._splits_tokens else reduce_from_tensor_model_parallel_region
            )
            output = reduce(output.contiguous(), group=self._group)
        return output, bias


def add_adapters(chunk: Any, lora: LoraConfig, groups: ModelGroups) -> None:
    """Freeze a model chunk and give its layers uninitialised adapters.

    Raises:
        ConfigError: see `check_lora` and `check_stages`.
    """
    check_lora(lora, chunk.architecture, groups.tensor.size())
    check_stages(lora, chunk.architecture, groups.layout.pipeline * (groups.layout.virtual_pipeline or 1))
    chunk.requires_grad_(False)
    _attach_to_layers(chunk, lora, groups, ADAPTER)
    if chunk.post_process and HEAD.chosen(lora):
        # Its product is part of the loss (`LanguageModel.head_inputs`), so the layer itself does not call it.
        head = Adapter(chunk.output_layer.weight, HEAD, 0, lora, chunk.architecture, groups)
        setattr(chunk.output_layer, ADAPTER, head)
    if chunk.pre_process:
        # Recomputed activations get gradients only if the layer's input requires one.
        chunk.embedding.register_forward_hook(_require_gradient)


def add_teacher_adapters(chunk: Any, lora: LoraConfig, groups: ModelGroups) -> None:
    """Give the layers of a model chunk with frozen weights a second, frozen set of uninitialised adapters, which is off.

    Raises:
        ConfigError: see `check_lora`.
    """
    check_lora(lora, chunk.architecture, groups.tensor.size(), "the adapters of teacher.path")
    if HEAD.chosen(lora):
        raise ConfigError(
            "teacher.weights=adapters cannot adapt lm_head, which the adapters of teacher.path do: set teacher.weights=path, "
            "with which they are merged into their base"
        )
    _attach_to_layers(chunk, lora, groups, TEACHER_ADAPTER)
    for adapter in adapters([chunk], TEACHER_ADAPTER):
        adapter.requires_grad_(False).eval()


def _attach_to_layers(chunk: Any, lora: LoraConfig, groups: ModelGroups, name: str) -> None:
    architecture: Architecture = chunk.architecture
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        for kind in linears_of_layer(architecture, number, lora):
            if not kind.of_experts:
                _attach(layer.get_submodule(kind.path), kind, number, lora, architecture, groups, name)
                continue
            assert architecture.experts is not None
            count = architecture.experts.count
            first = groups.groups.ep.rank() * (count // groups.layout.expert)
            for index, linear in enumerate(_expert_linears(layer.mlp.experts, kind.path.rpartition(".")[2])):
                _attach(linear, kind, number, lora, architecture, groups, name, (first + index, count))


def _expert_linears(experts: Any, name: str) -> list[Any]:
    """A linear layer of each expert of this rank, or Transformer Engine's one layer of all of them."""
    if hasattr(experts, "local_experts"):
        return [getattr(expert, name) for expert in experts.local_experts]
    return [getattr(experts, name)]


def _require_gradient(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden


def adapters(chunks: Iterable[nn.Module], name: str = ADAPTER) -> Iterator[Adapter]:
    """Every adapter of some model chunks: those that are trained, or those that teach."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Adapter) and module.name == name)


@torch.no_grad()
def initialise_adapters(chunks: Iterable[nn.Module], tensor: dist.ProcessGroup, seed: int) -> None:
    """Set A as `peft` does, uniform in +-1 / sqrt(inputs), and B to zero, so that the model begins as the frozen one. The draws
    are a function of the seed and the projection's name, the same in every layout. No communication."""
    for adapter in adapters(chunks):
        for factors in adapter.factors:
            rng = np.random.default_rng([seed, *factors.name.encode()])
            bound, columns = 1 / math.sqrt(factors.inputs), factors.a.size(1)
            whole = rng.uniform(-bound, bound, (factors.a.size(0), factors.inputs))
            start = tensor.rank() * columns if factors.is_row and factors.expert is None else 0
            factors.a.copy_(torch.from_numpy(whole[:, start : start + columns]))
            factors.b.zero_()


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
    split = (adapter for adapter in adapters(chunks) if adapter.shares_gradient)
    shared = [factors.shared.main_grad for adapter in split for factors in adapter.factors]  # type: ignore[attr-defined]
    if tensor.size() == 1 or not shared:
        return
    whole = torch.cat([gradient.flatten() for gradient in shared])
    dist.all_reduce(whole, group=tensor)
    for gradient, part in zip(shared, whole.split([each.numel() for each in shared]), strict=True):
        gradient.copy_(part.view_as(gradient))
