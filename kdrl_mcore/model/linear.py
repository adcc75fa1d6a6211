"""Megatron-Core's parallel linear layers, with a faster product for the few rows of a decoding step on a CPU.

x @ W^T with M rows reads all of W for 2 FLOP per row and element. MKL is faster if the long side of the result is contiguous,
that is, if it computes W @ x^T [N, M]: on two cores of an AMD EPYC (AVX2), float32, 32 rows, weights from memory, 78 ms
rather than 114 ms for the layers of a model of 135M parameters, and equal times from about 200 rows on. The result is the same
up to rounding.
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

_MOST_ROWS = 128
_LEAST_ELEMENTS = 2**17
"""Smaller weights stay in the cache of a core (512 KiB and more), where both products are equally fast."""
_BLOCK_COLUMNS = 2048
"""Columns of a block of `few_rows_product`: 256 KiB with 32 rows, transposed while they are in the cache."""


def has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether W @ x^T is the faster product for x [..., K] and W [N, K]: without gradients, in float32, on a CPU."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() <= _MOST_ROWS * x.size(-1)
        and weight.numel() >= _LEAST_ELEMENTS
    )


def few_rows_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ W^T [M, N], contiguous."""
    if not has_few_rows(x_MK, weight_NK):
        return x_MK @ weight_NK.t()
    result = x_MK.new_empty(len(x_MK), len(weight_NK))
    for rows, columns in zip(weight_NK.split(_BLOCK_COLUMNS), result.split(_BLOCK_COLUMNS, dim=1), strict=True):
        columns.copy_(torch.mm(rows, x_MK.t()).t())
    return result


def _transposed_product(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ W^T [..., N] of x [..., K], stored as [N, ...]: the operations that follow in a layer are element-wise, so
    either order will do."""
    return torch.mm(weight_NK, x.flatten(0, -2).t()).t().view(*x.shape[:-1], len(weight_NK))


class ColumnParallel(ColumnParallelLinear):
    """Megatron-Core's layer, with `_transposed_product` where it is faster. Then it also skips what only gradients need."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[S, ..., K] -> ([S, ..., N of this rank], the bias if the caller is to add it).

        Under sequence parallelism, an all-gather over the tensor-parallel group.
        """
        own = weight is None and not self.gather_output and not runtime_gather_output
        if not (own and has_few_rows(input_, self.weight)):
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel and not self.explicit_expert_comm:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        product = _transposed_product(input_, self.weight)
        if self.bias is None or self.skip_bias_add:
            return product, self.bias
        return product + self.bias, None


class RowParallel(RowParallelLinear):
    """Megatron-Core's layer, with `_transposed_product` where it is faster. Then it also skips what only gradients need."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, ..., K of this rank] -> ([S, ..., N], the bias if the caller is to add it).

        A SUM all-reduce over the tensor-parallel group, or under sequence parallelism a reduce-scatter.
        """
        if not (self.input_is_parallel and self.bias is None and has_few_rows(input_, self.weight)):
            return super().forward(input_)
        product = _transposed_product(input_, self.weight)
        if self.explicit_expert_comm or self.input_size_per_partition == self.input_size:
            return product, None
        product = product.contiguous()  # Megatron-Core's collectives need it
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(product, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(product, group=self.tp_group), None
