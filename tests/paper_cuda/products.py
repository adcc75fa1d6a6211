"""Products of 16-bit matrices with float32 results: torch has them on CUDA only, so paper CUDA adds them."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")
"""The implementations last as long as this object."""


def install() -> None:
    """Add `mm` and `addmm` with `out_dtype` on the CPU."""
    _library.impl("mm.dtype", _mm, "CPU")
    _library.impl("addmm.dtype_out", _addmm_out, "CPU")


def _mm(a_MK: Tensor, b_KN: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check(a_MK, b_KN, out_dtype)
    return a_MK.to(out_dtype) @ b_KN.to(out_dtype)


def _addmm_out(
    input_MN: Tensor, a_MK: Tensor, b_KN: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    _check(a_MK, b_KN, out_dtype)
    if out.dtype != out_dtype or input_MN.dtype not in (out_dtype, a_MK.dtype):
        raise RuntimeError(f"addmm: input {input_MN.dtype} and out {out.dtype} do not fit out_dtype {out_dtype}")
    product_MN = _mm(a_MK, b_KN, out_dtype) * alpha
    return out.copy_(product_MN + input_MN * beta if beta else product_MN)


def _check(a_MK: Tensor, b_KN: Tensor, out_dtype: torch.dtype) -> None:
    wide = out_dtype == torch.float32 and a_MK.dtype in (torch.float16, torch.bfloat16)
    if a_MK.dtype != b_KN.dtype or not (wide or out_dtype == a_MK.dtype):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
