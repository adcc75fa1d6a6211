"""Matrix products without gradients, and Megatron-Core's parallel linear layers that use them.

On CPUs oneDNN computes these products rather than MKL, which is slower on AMD processors. While a model generates, each large
weight also has a copy in the memory order of oneDNN's kernels: with the few rows of a decoding step, reading the weight takes
most of the time. docs/benchmarks.md has measurements.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F

_LEAST_ELEMENTS = 2**17
"""Smaller weights fit in the cache of a core (512 KiB or more), where all products are equally fast."""
_TYPICAL_ROWS = 32
"""The number of rows for which packed weights are laid out. They are as fast with any other number up to 128."""


def pack(weight_NK: Tensor) -> Tensor | None:
    """A copy of the weight for `product` in oneDNN's memory order; None where it would not be faster."""
    if not _is_onednns(weight_NK) or (weight_NK.dtype != torch.float32 and not _has_bfloat16()):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), _TYPICAL_ROWS)
    return packed


def product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ W^T + b [..., N] of x [..., K], without gradients; W as it is or from `pack`."""
    if weight_NK.is_mkldnn or (weight_NK.dtype == torch.float32 and _is_onednns(weight_NK)):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")
        return result
    # In two dimensions: with more, torch may copy the weight for each index of the first.
    return F.linear(x.flatten(0, -2), weight_NK, bias_N).view(*x.shape[:-1], len(weight_NK))


def _is_onednns(weight_NK: Tensor) -> bool:
    """Whether calling oneDNN directly is faster for this weight. In bfloat16, torch itself calls it."""
    return (
        weight_NK.device.type == "cpu"
        and weight_NK.dtype in (torch.float32, torch.bfloat16)
        and weight_NK.numel() >= _LEAST_ELEMENTS
        and torch.backends.mkldnn.is_available()
    )


def _has_bfloat16() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


class _PackableWeight:
    """A layer whose weight has a packed copy for a while.

    Attributes:
        packed: while a model generates, the weight from `pack`.
    """

    weight: Tensor
    packed: Tensor | None = None

    def pack_weight(self) -> None:
        """Make `packed`, unless it exists."""
        if self.packed is None:
            self.packed = pack(self.weight)

    def unpack_weight(self) -> None:
        """Drop `packed`."""
        self.packed = None


class ColumnParallel(_PackableWeight, ColumnParallelLinear):
    """Megatron-Core's layer, which without gradients computes `product` and skips what only gradients need."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[S, ..., K] -> ([S, ..., N of this rank], the bias if the caller is to add it).

        Under sequence parallelism, an all-gather over the tensor-parallel group.
        """
        own = weight is None and not self.gather_output and not runtime_gather_output
        if torch.is_grad_enabled() or not own or input_.device.type != "cpu":
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel and not self.explicit_expert_comm:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        if self.skip_bias_add:
            return self.product(input_, with_bias=False), self.bias
        return self.product(input_), None

    def product(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        """This rank's columns of the result for all rows, without collectives and without gradients."""
        return product(x, self.weight if self.packed is None else self.packed, self.bias if with_bias else None)


class RowParallel(_PackableWeight, RowParallelLinear):
    """Megatron-Core's layer, which without gradients computes `product` and skips what only gradients need."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, ..., K of this rank] -> ([S, ..., N], the bias if the caller is to add it).

        A SUM all-reduce over the tensor-parallel group, or under sequence parallelism a reduce-scatter.
        """
        if torch.is_grad_enabled() or not self.input_is_parallel or self.bias is not None or input_.device.type != "cpu":
            return super().forward(input_)
        result = self.product(input_)
        if self.explicit_expert_comm or self.input_size_per_partition == self.input_size:
            return result, None
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(result, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(result, group=self.tp_group), None

    def product(self, x: Tensor) -> Tensor:
        """This rank's term of the result, without the bias, without collectives and without gradients."""
        return product(x, self.weight if self.packed is None else self.packed)
