"""Triton kernels over the logits of one chunk: softmax statistics in one read, the derivative in place in one pass.

All sums are in float32 for every type of logits. Running maxima start from a finite number, since a difference of infinities
would be NaN. The number of columns should be a multiple of 16: only then does the compiler know that 16 bytes belong to one row
and move them in one access instead of eight.

C rows, V columns of this rank, z the student's and y the teacher's logits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import Comparison
from kdrl_mcore.vocab_parallel.logits import MASKED, largest_logits

STATISTICS_BLOCK = 4096
TEACHER_STATISTICS_BLOCK = 2048
GRADIENT_BLOCK = 2048
MIXTURE_BLOCK = 2048
LARGEST_BLOCK = 2048
"""Columns that one program handles at a time, chosen so that its sums stay in registers with three programs on a
multiprocessor."""
WARPS = 8
REGISTERS = 80
"""Registers of a thread that holds a block's sums, for three programs on a multiprocessor. Without the limit, ptxas spills
registers to fit a fourth."""


def statistics(z_CV: Tensor, y_CV: Tensor | None, *, forward: bool = False, teacher_entropy: bool = False) -> Tensor:
    """Statistics of each row in float32, with m its largest z and n its largest y: (m, sum e^(z-m), sum e^(z-m) (z-m)), [3, C];
    with a teacher also (n, sum e^(y-n), sum e^(z-m) ((y-n) - (z-m))), [6, C], where the weight of the last is e^(y-n) if
    `forward`; and with `teacher_entropy` also sum e^(y-n) (y-n), [7, C]. One read of the logits. A row without columns gives
    `MASKED` and zeros."""
    rows, columns = z_CV.shape
    out_KC = torch.empty(3 if y_CV is None else 6 + teacher_entropy, rows, dtype=torch.float32, device=z_CV.device)
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
                FORWARD=forward,
                ENTROPY=teacher_entropy,
                BLOCK=block,
                num_warps=WARPS,
                maxnreg=REGISTERS,
            )
    return out_KC


def mixture(z_CV: Tensor, y_CV: Tensor, numbers_KC: Tensor, beta: float) -> Tensor:
    """(sum_v p_v log(p_v / m_v), sum_v q_v log(q_v / m_v)) of each row with m = beta q + (1 - beta) p, [2, C] in float32. One
    read of the logits.

    Args:
        numbers_KC: float32 rows (largest z, log sum of exponentials of the centred z, and both of y).
    """
    return _two_sums(_mixture, z_CV, y_CV, numbers_KC, beta, 1.0 - beta)


def clipped(z_CV: Tensor, y_CV: Tensor, numbers_KC: Tensor, bound: float) -> Tensor:
    """(sum_v min(q_v log(q_v / p_v), bound), the sum of q_v where this term is at most the bound) of each row, [2, C] in
    float32. One read of the logits.

    Args:
        numbers_KC: as for `mixture`.
    """
    return _two_sums(_clipped, z_CV, y_CV, numbers_KC, bound)


def _two_sums(kernel: Any, z_CV: Tensor, y_CV: Tensor, numbers_KC: Tensor, *parameters: float) -> Tensor:
    """Run a kernel that computes two sums of each row from both models' logits."""
    rows, columns = z_CV.shape
    out_KC = torch.empty(2, rows, dtype=torch.float32, device=z_CV.device)
    if rows:
        with torch.cuda.device_of(z_CV):
            kernel[(rows,)](
                z_CV,
                z_CV.stride(0),
                y_CV,
                y_CV.stride(0),
                numbers_KC,
                out_KC,
                rows,
                columns,
                *parameters,
                BLOCK=min(MIXTURE_BLOCK, triton.next_power_of_2(max(columns, 1))),
                num_warps=WARPS,
            )
    return out_KC


def differentiate(
    z_CV: Tensor,
    y_CV: Tensor | None,
    column_C: Tensor,
    numbers_KC: Tensor,
    comparison: Comparison = "reverse",
    parameter: float = 0.5,
) -> None:
    """Overwrite z by dL/dz_v = e_v (a + b z'_v) + c c_v + g 1[v = column], with z', y' the centred logits and c_v as in
    `chunk_logits.Comparison`; without a teacher c is 0.

    Args:
        column_C: the target's local column, -1 if another rank holds it.
        numbers_KC: float32 rows (largest z, a, b, g), with a teacher also (largest y, c), for `mixture` and `clipped` also the
            logs of the sums of exponentials of z' and y'.
        parameter: beta of `mixture`, the bound of `clipped`.
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
                parameter,
                1.0 - parameter,
                COMPARISON="none" if y_CV is None else comparison,
                BLOCK=block,
                num_warps=WARPS,
            )


def largest(z_CV: Tensor, top_k: int) -> Tensor:
    """The columns [C, top_k] of the largest logits, in ascending order of columns; among equal logits, the lower columns.

    `largest_logits` does not specify which of equal logits it returns, so it is used only to find the threshold. A second read
    takes the columns above the threshold and the first ones equal to it: exactly top_k, so the host need not count them.
    """
    rows, columns = z_CV.shape
    column_CK = torch.empty(rows, top_k, dtype=torch.long, device=z_CV.device)
    if rows and top_k:
        values_CK, _ = largest_logits(z_CV, top_k)
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
    z_ptr,
    z_stride,
    y_ptr,
    y_stride,
    out_ptr,
    rows,
    columns,
    LOWEST: tl.constexpr,
    TEACHER: tl.constexpr,
    FORWARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
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
    teacher_product = tl.zeros((BLOCK,), tl.float32)
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
            f = tl.exp(y)
            teacher_scale = tl.exp(teacher_shift)
            if FORWARD:
                difference = teacher_scale * (difference + (teacher_shift - shift) * teacher_total) + f * (y - z)
            else:
                difference = scale * (difference + (teacher_shift - shift) * total) + e * (y - z)
            if ENTROPY:
                teacher_product = teacher_scale * (teacher_product + teacher_shift * teacher_total) + f * y
            teacher_total = teacher_scale * teacher_total + f
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
        if ENTROPY:
            tl.store(out_ptr + 6 * rows + row, tl.sum(teacher_product, axis=0))


@triton.jit
def _log_mixture(u, beta, rest):
    """log(m / p) where u = log(q / p) <= 0, and log(m / q) where u > 0; the other of the two differs from it by u. Nothing
    overflows, also where p or q is 0 in float32."""
    power = tl.exp(-tl.abs(u))
    share = tl.where(u > 0, rest, beta)
    inside = tl.where(u > 0, beta, rest) + share * power
    change = share * (power - 1.0)
    rounded = inside - 1.0
    # log(1 + x) = x log(w) / (w - 1) with w = 1 + x as it is rounded: also a small beta keeps its digits.
    return tl.where(rounded == 0.0, change, tl.log(inside) * (change / rounded))


@triton.jit(do_not_specialize=["rows", "beta", "rest"])
def _mixture(z_ptr, z_stride, y_ptr, y_stride, numbers_ptr, out_ptr, rows, columns, beta, rest, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    z_row = z_ptr + row * z_stride
    y_row = y_ptr + row * y_stride
    peak = tl.load(numbers_ptr + row)
    log_total = tl.load(numbers_ptr + rows + row)
    teacher_peak = tl.load(numbers_ptr + 2 * rows + row)
    teacher_log_total = tl.load(numbers_ptr + 3 * rows + row)
    student = tl.zeros((BLOCK,), tl.float32)
    teacher = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        log_p = tl.load(z_row + start + lanes, mask=inside, other=0.0).to(tl.float32) - peak - log_total
        log_q = tl.load(y_row + start + lanes, mask=inside, other=0.0).to(tl.float32) - teacher_peak - teacher_log_total
        u = log_q - log_p
        log_m = _log_mixture(u, beta, rest)
        student -= tl.where(inside, tl.exp(log_p) * (log_m + tl.maximum(u, 0.0)), 0.0)
        teacher -= tl.where(inside, tl.exp(log_q) * (log_m - tl.minimum(u, 0.0)), 0.0)
    tl.store(out_ptr + row, tl.sum(student, axis=0))
    tl.store(out_ptr + rows + row, tl.sum(teacher, axis=0))


@triton.jit
def _term(log_p, log_q):
    """q log(q / p)."""
    return tl.exp(log_q) * (log_q - log_p)


@triton.jit(do_not_specialize=["rows", "bound"])
def _clipped(z_ptr, z_stride, y_ptr, y_stride, numbers_ptr, out_ptr, rows, columns, bound, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    z_row = z_ptr + row * z_stride
    y_row = y_ptr + row * y_stride
    peak = tl.load(numbers_ptr + row)
    log_total = tl.load(numbers_ptr + rows + row)
    teacher_peak = tl.load(numbers_ptr + 2 * rows + row)
    teacher_log_total = tl.load(numbers_ptr + 3 * rows + row)
    value = tl.zeros((BLOCK,), tl.float32)
    kept = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        log_p = (tl.load(z_row + start + lanes, mask=inside, other=0.0).to(tl.float32) - peak) - log_total
        log_q = (tl.load(y_row + start + lanes, mask=inside, other=0.0).to(tl.float32) - teacher_peak) - teacher_log_total
        term = _term(log_p, log_q)
        value += tl.where(inside, tl.minimum(term, bound), 0.0)
        kept += tl.where(inside & (term <= bound), tl.exp(log_q), 0.0)
    tl.store(out_ptr + row, tl.sum(value, axis=0))
    tl.store(out_ptr + rows + row, tl.sum(kept, axis=0))


@triton.jit(do_not_specialize=["rows", "parameter", "rest"])
def _differentiate(
    z_ptr,
    z_stride,
    y_ptr,
    y_stride,
    column_ptr,
    numbers_ptr,
    rows,
    columns,
    parameter,
    rest,
    COMPARISON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    at = z_ptr + row * z_stride + lanes
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32) - tl.load(numbers_ptr + row)
    factor = tl.load(numbers_ptr + rows + row) + tl.load(numbers_ptr + 2 * rows + row) * z
    d = tl.zeros((BLOCK,), tl.float32)
    if COMPARISON != "none":
        y = tl.load(y_ptr + row * y_stride + lanes, mask=inside, other=0.0).to(tl.float32) - tl.load(
            numbers_ptr + 4 * rows + row
        )
        comparison = tl.load(numbers_ptr + 5 * rows + row)
        if COMPARISON == "reverse":
            factor += comparison * (y - z)
        elif COMPARISON == "forward":
            d += comparison * tl.exp(y)
        else:
            log_p = z - tl.load(numbers_ptr + 6 * rows + row)
            log_q = y - tl.load(numbers_ptr + 7 * rows + row)
            if COMPARISON == "clipped":
                d += comparison * tl.where(_term(log_p, log_q) <= parameter, tl.exp(y), 0.0)
            else:
                u = log_q - log_p
                factor += comparison * (_log_mixture(u, parameter, rest) + tl.maximum(u, 0.0))
    d += tl.exp(z) * factor
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
