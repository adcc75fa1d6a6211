"""Variable-length attention in place of the CUDA kernel: one operation each way, which keeps its inputs and its result for the
backward pass. The scores of the plain form do not count as memory of the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.paper_cuda import streams
from tests.paper_cuda.dispatch import unwatched
from tests.paper_cuda.memory import Block, allocate, index_of, mark_of
from tests.support import varlen


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, plain: Callable[..., Tensor]) -> Tensor:
        with unwatched():
            out = plain(query, key, value)
        _launch([query, key, value], [out])
        context.plain = plain
        context.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        *inputs, out = context.saved_tensors
        with unwatched(), torch.enable_grad():  # type: ignore[no-untyped-call]
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            results = torch.autograd.grad(context.plain(*leaves), leaves, gradients)
        _launch([*inputs, out, *gradients], [*results])
        return *results, None


def _launch(inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """One kernel on the current stream.

    Raises:
        RuntimeError: an input is not on the current GPU.
    """
    stream, index = streams.current(), streams.current_index()
    tick = stream.tick()
    for tensor in inputs:
        block = mark_of(tensor)
        if not isinstance(block, Block) or block.index != index:
            where = "cpu" if index_of(tensor) is None else f"cuda:{index_of(tensor)}"
            raise RuntimeError(f"Expected all tensors to be on the same device: attention on cuda:{index} got one on {where}")
        block.use(tensor, stream, tick, writes=False, operation="attention")
    for tensor in outputs:
        allocate(tensor, index, "attention").use(tensor, stream, tick, writes=True, operation="attention")


def _attend(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **settings: Any) -> Tensor:
    return _Attention.apply(query, key, value, partial(_plain, bounds, settings))  # type: ignore[no-any-return, no-untyped-call]


def _plain(bounds: tuple[Any, ...], settings: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return varlen.varlen_attn(query, key, value, *bounds, **settings)


def install() -> None:
    """Replace torch's function with this one."""
    from torch.nn.attention import varlen as torch_varlen

    torch_varlen.varlen_attn = _attend  # type: ignore[assignment]
