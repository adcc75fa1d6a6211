"""The matrix product, which Megatron-Core's router calls directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch.module.base import check_device, refuse


def general_gemm(
    A: Tensor,
    B: Tensor,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: bool = False,
    gelu_in: Tensor | None = None,
    alpha: float = 1.0,
    beta: float | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Tensor | None = None,
    bias: Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
) -> tuple[Tensor, None, None, None]:
    """B A^T (TN), B A (NN) or B^T A (NT), accumulated in float32 at least."""
    refuse(quantized=quantization_params, gelu=gelu, scale=alpha != 1.0 or beta, accumulate=accumulate, overlap=ub)
    refuse(out=out is not None, bias=bias is not None, extra=extra_output is not None, bulk=bulk_overlap)
    check_device(A, B)
    left, right = {"TN": (B, A.T), "NN": (B, A), "NT": (B.T, A)}[layout]
    return (left.float() @ right.float()).to(out_dtype or A.dtype), None, None, None
