"""Parallel linear layers, one for each expert; the token dispatcher does their communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled
from transformer_engine.pytorch.module.base import (
    GEMM_PARALLEL_MODES,
    TransformerEngineBaseModule,
    initialize,
    refuse,
    set_tensor_model_parallel_attributes,
    weight_gradient,
)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, splits: list[int], fuse: bool, is_first: bool | None, *weights: nn.Parameter) -> Tensor:
        ctx.save_for_backward(inp, *weights)
        ctx.weights = weights if is_cpu_offload_enabled() else None  # autograd's hooks lose a parameter's attributes
        ctx.splits, ctx.fuse, ctx.is_first = splits, fuse, is_first
        return torch.cat([rows @ weight.T for rows, weight in zip(inp.split(splits), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inp, *saved = ctx.saved_tensors
        weights = saved if ctx.weights is None else ctx.weights
        parts = list(zip(grad.split(ctx.splits), inp.split(ctx.splits), weights, strict=True))
        wgrads: list[Tensor | None] = [None] * len(parts)
        if weights[0].requires_grad:
            wgrads = [weight_gradient(w, g.float().T @ x.float(), ctx.fuse, ctx.is_first) for g, x, w in parts]
        dgrad = torch.cat([part @ weight for part, _, weight in parts]) if ctx.needs_input_grad[0] else None
        return dgrad, None, None, None, *wgrads


class GroupedLinear(TransformerEngineBaseModule):
    """`num_gemms` products, each of a consecutive range of rows."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not ub_overlap_rs and not ub_overlap_ag, "GroupedLinear doesn't support Userbuffer overlap."
        assert parallel_mode in GEMM_PARALLEL_MODES, f"parallel_mode {parallel_mode} not supported"
        refuse(bias=bias, delay=delay_wgrad_compute)
        self._take_tensor_parallel(tp_group, tp_size)
        self.num_gemms, self.parallel_mode, self.fuse_wgrad_accumulation = num_gemms, parallel_mode, fuse_wgrad_accumulation
        self.use_bias, self.return_bias, self.save_original_input = bias, return_bias, save_original_input
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=params_dtype))
            initialize(weight, init_method)
            set_tensor_model_parallel_attributes(weight, dim=1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        self._check_input(inp)
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return _GroupedLinear.apply(inp, m_splits, self.fuse_wgrad_accumulation, is_first_microbatch, *weights)
