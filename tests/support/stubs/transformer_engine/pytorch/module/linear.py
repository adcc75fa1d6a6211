"""Linear layers, one with a norm before it, with the collectives of tensor and sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
from transformer_engine.pytorch.module.norm import normalize


class _Settings(NamedTuple):
    parallel_mode: str | None
    sequence_parallel: bool
    group: dist.ProcessGroup | None
    size: int
    fuse: bool
    is_first_microbatch: bool | None

    def gather(self, rows: Tensor) -> Tensor:
        whole = rows.new_empty(self.size * rows.size(0), *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows.contiguous(), group=self.group)
        return whole

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        part = rows.new_empty(rows.size(0) // self.size, *rows.shape[1:])
        dist.reduce_scatter_tensor(part, rows.contiguous(), group=self.group)
        return part

    def all_reduce(self, rows: Tensor) -> Tensor:
        dist.all_reduce(rows, group=self.group)
        return rows


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, weight: nn.Parameter, bias: Tensor | None, settings: _Settings) -> Tensor:
        ctx.save_for_backward(inp, weight)
        ctx.weight_object = weight if is_cpu_offload_enabled() else None  # autograd's hooks lose a parameter's attributes
        ctx.has_bias, ctx.settings = bias is not None, settings
        whole = settings.gather(inp) if settings.parallel_mode == "column" and settings.sequence_parallel else inp
        out = nn.functional.linear(whole, weight, bias)
        if settings.parallel_mode == "row" and settings.size > 1:
            out = settings.reduce_scatter(out) if settings.sequence_parallel else settings.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (inp, weight), settings = ctx.saved_tensors, ctx.settings
        weight = weight if ctx.weight_object is None else ctx.weight_object
        column = settings.parallel_mode == "column" and settings.size > 1
        if settings.parallel_mode == "row" and settings.sequence_parallel:
            grad = settings.gather(grad)
        wgrad = dgrad = None
        if ctx.needs_input_grad[1]:
            whole = settings.gather(inp) if column and settings.sequence_parallel else inp
            product = grad.flatten(0, -2).float().T @ whole.flatten(0, -2).float()
            wgrad = weight_gradient(weight, product, settings.fuse, settings.is_first_microbatch)
        if ctx.needs_input_grad[0]:
            dgrad = grad @ weight
            if column:
                dgrad = settings.reduce_scatter(dgrad) if settings.sequence_parallel else settings.all_reduce(dgrad)
        return dgrad, wgrad, grad.flatten(0, -2).sum(0) if ctx.has_bias else None, None


class _LinearModule(TransformerEngineBaseModule):
    """The weight, the bias, and the product."""

    def _build(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: dist.ProcessGroup | None,
        tp_size: int,
        parallel_mode: str | None,
        device: Any,
        params_dtype: torch.dtype | None,
        init_method: Callable[[Tensor], Any] | None,
        bias: bool,
        return_bias: bool,
    ) -> None:
        assert parallel_mode in GEMM_PARALLEL_MODES, f"parallel_mode {parallel_mode} not supported"
        self._take_tensor_parallel(tp_group, tp_size)
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        settings: dict[str, Any] = {"device": device, "dtype": params_dtype}
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **settings))
        initialize(self.weight, init_method)
        set_tensor_model_parallel_attributes(self.weight, dim=1 if parallel_mode == "row" else 0)
        if not bias:
            self.bias = torch.empty(0, **settings)
            return
        self.bias = nn.Parameter(torch.zeros(self.out_features, **settings))
        if parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif parallel_mode == "column":
            set_tensor_model_parallel_attributes(self.bias, dim=0)

    def _multiply(self, inp: Tensor, is_first_microbatch: bool | None) -> Tensor | tuple[Tensor, Tensor]:
        settings = _Settings(
            self.parallel_mode,
            self.sequence_parallel,
            self.tp_group,
            self.tp_size,
            self.fuse_wgrad_accumulation,
            is_first_microbatch,
        )
        after = self.apply_bias and self.parallel_mode == "row"
        out = _Linear.apply(inp, self.weight, self.bias if self.apply_bias and not after else None, settings)
        if after:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class Linear(_LinearModule):
    """y = x W^T + b."""

    def __init__(
        self,
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
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        refuse(split=parameters_split, overlap=ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad)
        refuse(bulk=ub_bulk_dgrad or ub_bulk_wgrad, delay=delay_wgrad_compute, symmetric=symmetric_ar_type)
        self.save_original_input = save_original_input
        self._build(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            parallel_mode,
            device,
            params_dtype,
            init_method,
            bias,
            return_bias,
        )

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        self._check_input(inp)
        return self._multiply(inp, is_first_microbatch)


class LayerNormLinear(_LinearModule):
    """y = norm(x) W^T + b; under sequence parallelism the norm sees this rank's rows alone."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        refuse(split=parameters_split, overlap=ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad)
        refuse(bulk=ub_bulk_dgrad or ub_bulk_wgrad, delay=delay_wgrad_compute, symmetric=symmetric_ar_type)
        refuse(norm_output=return_layernorm_output or return_layernorm_output_gathered)
        assert normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        fill = 0.0 if zero_centered_gamma else 1.0
        settings: dict[str, Any] = {"device": device, "dtype": params_dtype}
        self.layer_norm_weight = nn.Parameter(torch.full((in_features,), fill, **settings))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **settings)) if normalization == "LayerNorm" else None
        self._build(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            parallel_mode,
            device,
            params_dtype,
            init_method,
            bias,
            return_bias,
        )
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        self._check_input(inp)
        normal = normalize(
            inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization, self.zero_centered_gamma
        )
        return self._multiply(normal, is_first_microbatch)
