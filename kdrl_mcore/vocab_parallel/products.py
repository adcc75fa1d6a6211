"""Matrix products of 16-bit factors, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
"""The size of the blocks in which CPUs form a product before adding it."""


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, first: bool) -> None:
    """sum += a @ b, in place. The sum has the factors' type or, for 16-bit factors, float32.

    On CUDA a single product accumulates into the sum: 2*M*K*N FLOP and 8*M*N bytes (4*M*N for the first one), and nothing is
    rounded to 16 bits. CPUs have no such product; there it is computed block by block in the factors' type and then added.

    Args:
        first: whether the sum is uninitialised, so that the product overwrites it.
    """
    beta = 0 if first else 1
    if sum_MN.dtype == a_MK.dtype:
        sum_MN.addmm_(a_MK, b_KN, beta=beta)
    elif sum_MN.device.type == "cuda":
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, beta=beta, out=sum_MN)
    else:
        rows = max(1, BLOCK_BYTES // (b_KN.element_size() * b_KN.size(1)))
        for start in range(0, len(sum_MN), rows):
            block = slice(start, start + rows)
            part_BN = a_MK[block] @ b_KN
            if first:
                sum_MN[block] = part_BN
            else:
                sum_MN[block] += part_BN


def wide_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b without rounding to 16 bits: [M, N] in at least float32."""
    wide = torch.promote_types(a_MK.dtype, torch.float32)
    if a_MK.dtype != wide and a_MK.device.type == "cuda":
        return torch.mm(a_MK, b_KN, out_dtype=wide)
    return a_MK.to(wide) @ b_KN.to(wide)
