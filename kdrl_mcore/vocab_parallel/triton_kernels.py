"""Triton kernels over the logits of one chunk: softmax statistics in one read, the derivative in place in one pass.

All sums are in float32 for every type of logits. Running maxima start from a finite number, since a difference of infinities
would be NaN. The number of columns should be a multiple of 16: only then does the compiler know that 16 bytes belong to one row
and move them in one access instead of eight.

C rows, V columns of this rank, z the student's and y the teacher's logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_mcore.vocab_parallel.logits import MASKED

STATISTICS_BLOCK = 4096
TEACHER_STATISTICS_BLOCK = 2048
GRADIENT_BLOCK = 2048
LARGEST_BLOCK = 2048
"""Columns that one program handles at a time, chosen so that its sums stay in registers with three programs on a
multiprocessor."""
WARPS = 8
REGISTERS = 80
"""Registers of a thread that holds a block's sums, for three programs on a multiprocessor. Without the limit, ptxas spills
registers to fit a fourth."""


def statistics(z_CV: Tensor, y_CV: Tensor | None) -> Tensor:
    """Statistics of each row in float32, with m its largest z and n its largest y: (m, sum e^(z-m), sum e^(z-m) (z-m)), [3, C];
    with a teacher also (n, sum e^(y-n), sum e^(z-m) ((y-n) - (z-m))), [6, C]. One read of the logits. A row without columns
    gives `MASKED` and zeros."""
    rows, columns = z_CV.shape
    out_KC = torch.empty(3 if y_CV is None else 6, rows, dtype=torch.float32, device=z_CV.device)
    if rows:
        block = min(STATISTICS_BLOCK if y_CV is None else TEACHER_STATISTICS_BLOCK, triton.next_power_of_2(max(columns, 1)))
        with torch.cuda.device_of(z_CV):
            _statistics[(rows,)](
                z_CV,
                z_CV.stride(0),
                z_CV if y_CV is None else y_CV,
                0 if y_CV is None else y_CV.stride(0),
                out_KC,
                rows,
                columns,
                LOWEST=MASKED,
                TEACHER=y_CV is not None,
                BLOCK=block,
                num_warps=WARPS,
                maxnreg=REGISTERS,
            )
    return out_KC


def differentiate(z_CV: Tensor, y_CV: Tensor | None, column_C: Tensor, numbers_KC: Tensor) -> None:
    """Overwrite z by dL/dz_v = e_v (a + b z'_v + c (y'_v - z'_v)) + g 1[v = column], with z', y' the centred logits.

    Args:
        column_C: the target's local column, -1 if another rank holds it.
        numbers_KC: float32 rows (largest z, a, b, g), with a teacher also (largest y, c).
    """
    rows, columns = z_CV.shape
    if rows and columns:
        block = min(GRADIENT_BLOCK, triton.next_power_of_2(columns))
        with torch.cuda.device_of(z_CV):
            _differentiate[(rows, triton.cdiv(columns, block))](
                z_CV,
                z_CV.stride(0),
                z_CV if y_CV is None else y_CV,
                0 if y_CV is None else y_CV.stride(0),
                column_C,
                numbers_KC,
                rows,
                columns,
                TEACHER=y_CV is not None,
                BLOCK=block,
                num_warps=WARPS,
            )


def largest(z_CV: Tensor, top_k: int) -> Tensor:
    """The columns [C, top_k] of the largest logits, in ascending order of columns; among equal logits, the lower columns.

    `torch.topk` does not specify which of equal logits it returns, so it is used only to find the threshold. A second read
    takes the columns above the threshold and the first ones equal to it: exactly top_k, so the host need not count them.
    """
    rows, columns = z_CV.shape
    column_CK = torch.empty(rows, top_k, dtype=torch.long, device=z_CV.device)
    if rows and top_k:
        values_CK = z_CV.topk(top_k, dim=1, sorted=False).values
        threshold_C = values_CK.amin(dim=1)
        above_C = (values_CK > threshold_C[:, None]).sum(dim=1, dtype=torch.int32)
        with torch.cuda.device_of(z_CV):
            _largest[(rows,)](
                z_CV,
                z_CV.stride(0),
                threshold_C,
                above_C,
                column_CK,
                columns,
                top_k,
                BLOCK=min(LARGEST_BLOCK, triton.next_power_of_2(columns)),
                num_warps=WARPS,
            )
    return column_CK.sort(dim=1).values


def overwrite(d_CV: Tensor, column_CK: Tensor, own_CK: Tensor, values_CK: Tensor) -> None:
    """d[c, column_CK[c, k]] = values_CK[c, k] where own_CK[c, k]; columns are distinct within a row."""
    rows, count = column_CK.shape
    if rows and count and d_CV.size(1):
        with torch.cuda.device_of(d_CV):
            _overwrite[(rows,)](
                d_CV,
                d_CV.stride(0),
                torch.where(own_CK, column_CK, -1).contiguous(),
                values_CK.contiguous(),
                count,
                BLOCK=triton.next_power_of_2(count),
            )


@triton.jit(do_not_specialize=["rows"])
def _statistics(
    z_ptr, z_stride, y_ptr, y_stride, out_ptr, rows, columns, LOWEST: tl.constexpr, TEACHER: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row. The sums stay spread over the block's lanes until the end. Only the largest logit is needed by all
    lanes, so a step costs one reduction per model."""
    row = tl.program_id(0).to(tl.int64)  # C * V can exceed 32 bits
    lanes = tl.arange(0, BLOCK)
    z_row = z_ptr + row * z_stride
    y_row = y_ptr + row * y_stride
    peak = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    teacher_peak = tl.full((), LOWEST, tl.float32)
    teacher_total = tl.zeros((BLOCK,), tl.float32)
    difference = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        z = tl.where(inside, tl.load(z_row + start + lanes, mask=inside, other=0.0).to(tl.float32), LOWEST)
        larger = tl.maximum(peak, tl.max(z, axis=0))
        shift = peak - larger
        z = z - larger
        e = tl.exp(z)
        scale = tl.exp(shift)
        if TEACHER:
            y = tl.where(inside, tl.load(y_row + start + lanes, mask=inside, other=0.0).to(tl.float32), LOWEST)
            teacher_larger = tl.maximum(teacher_peak, tl.max(y, axis=0))
            teacher_shift = teacher_peak - teacher_larger
            y = y - teacher_larger
            teacher_total = tl.exp(teacher_shift) * teacher_total + tl.exp(y)
            difference = scale * (difference + (teacher_shift - shift) * total) + e * (y - z)
            teacher_peak = teacher_larger
        product = scale * (product + shift * total) + e * z
        total = scale * total + e
        peak = larger
    tl.store(out_ptr + row, peak)
    tl.store(out_ptr + rows + row, tl.sum(total, axis=0))
    tl.store(out_ptr + 2 * rows + row, tl.sum(product, axis=0))
    if TEACHER:
        tl.store(out_ptr + 3 * rows + row, teacher_peak)
        tl.store(out_ptr + 4 * rows + row, tl.sum(teacher_total, axis=0))
        tl.store(out_ptr + 5 * rows + row, tl.sum(difference, axis=0))


@triton.jit(do_not_specialize=["rows"])
def _differentiate(
    z_ptr, z_stride, y_ptr, y_stride, column_ptr, numbers_ptr, rows, columns, TEACHER: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    at = z_ptr + row * z_stride + lanes
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32) - tl.load(numbers_ptr + row)
    factor = tl.load(numbers_ptr + rows + row) + tl.load(numbers_ptr + 2 * rows + row) * z
    if TEACHER:
        y = tl.load(y_ptr + row * y_stride + lanes, mask=inside, other=0.0).to(tl.float32) - tl.load(
            numbers_ptr + 4 * rows + row
        )
        factor += tl.load(numbers_ptr + 5 * rows + row) * (y - z)
    d = tl.exp(z) * factor
    d += tl.where(lanes == tl.load(column_ptr + row), tl.load(numbers_ptr + 3 * rows + row), 0.0)
    tl.store(at, d.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _largest(z_ptr, z_stride, threshold_ptr, above_ptr, column_ptr, columns, count, BLOCK: tl.constexpr):
    """One program per row. Columns above the threshold are stored first, then those equal to it, each in ascending order. Few
    blocks contain any."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    z_row = z_ptr + row * z_stride
    column_row = column_ptr + row * count
    threshold = tl.load(threshold_ptr + row).to(tl.float32)
    next_above = 0
    next_equal = tl.load(above_ptr + row)
    for start in range(0, columns, BLOCK):
        column = start + lanes
        inside = column < columns
        z = tl.load(z_row + column, mask=inside, other=0.0).to(tl.float32)
        above = inside & (z > threshold)
        # "Neither above nor below" rather than "equal": a row of NaN keeps its first columns, and its loss shows the NaN.
        equal = inside & ~(z > threshold) & ~(z < threshold)
        found = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # two counts in one scan: a block is shorter than 2^15
        total = tl.sum(found, axis=0)
        if total > 0:
            before = tl.cumsum(found, axis=0) - found
            place = tl.where(above, next_above + (before & 0xFFFF), next_equal + (before >> 16))
            tl.store(column_row + place, column.to(tl.int64), mask=above | (equal & (place < count)))
            next_above += total & 0xFFFF
            next_equal += total >> 16


@triton.jit
def _overwrite(d_ptr, d_stride, column_ptr, values_ptr, count, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < count
    column = tl.load(column_ptr + row * count + lanes, mask=inside, other=-1)
    value = tl.load(values_ptr + row * count + lanes, mask=inside, other=0.0)
    tl.store(d_ptr + row * d_stride + column, value.to(d_ptr.dtype.element_ty), mask=column >= 0)
