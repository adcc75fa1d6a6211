"""Variable-length attention as torch and flash-attn document it, in plain torch; tests put it in place of the CUDA kernels.
Like them, it refuses unsupported arguments and never reads sequence boundaries on the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: [Q, N, D], [F, K, D], [F, K, D] -> [Q, N, D].

    The output is NaN for a query beyond `max_q`, and for a query that would see a key beyond `max_k`.
    """
    assert return_aux is seqused_k is block_table is num_splits is None
    assert window_size == (-1, -1) or (window_size[0] >= -1 and window_size[1] == 0)
    assert query.dim() == key.dim() == value.dim() == 3 and key.shape == value.shape
    assert enable_gqa or query.size(1) == key.size(1)
    assert len({query.dtype, key.dtype, value.dtype}) == 1
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1
    for bounds in (cu_seq_q, cu_seq_k):
        if bounds.dtype != torch.int32 or not bounds.is_contiguous() or bounds.device != query.device:
            raise RuntimeError("boundaries must be contiguous int32 on the queries' device")
    assert cu_seq_q.shape == cu_seq_k.shape
    (of_q, from_q, left_q), (of_k, from_k, left_k) = (
        _places(bounds, len(rows)) for bounds, rows in ((cu_seq_q, query), (cu_seq_k, key))
    )
    seen = of_q[:, None] == of_k
    before = (
        left_k - left_q[:, None]
    )  # distance from each key to the query's own, aligned at the lower right: the last query sees the last key
    if window_size[1] == 0:
        seen &= before >= 0
    if window_size[0] >= 0:
        seen &= before <= window_size[0]
    number = query.size(1) // key.size(1)
    every = [x.repeat_interleave(number, dim=1).to(_working(x)) for x in (key, value)]
    scores = torch.einsum("qnd,knd->nqk", query.to(_working(query)), every[0]) * (scale or 1 / math.sqrt(query.size(-1)))
    beyond = (from_q >= max_q)[:, None] | (seen & (from_k >= max_k))
    weights = scores.masked_fill(~seen, -torch.inf).masked_fill(beyond, torch.nan).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, every[1]).to(query.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """flash-attn's function of this name, limited to the arguments that are used."""
    assert dropout_p == 0.0 and deterministic == torch.are_deterministic_algorithms_enabled()
    window = (window_size[0], 0) if causal else window_size
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen_attn(q, k, v, *bounds, scale=softmax_scale, window_size=window, enable_gqa=True)


def install() -> None:
    """Replace torch's function with this one, in a process whose only GPUs are paper ones."""
    from torch.nn.attention import varlen

    varlen.varlen_attn = varlen_attn  # type: ignore[assignment]


def _places(bounds: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: its sequence, and how many rows of the sequence come before and after it. Rows of no sequence share one."""
    row = torch.arange(rows, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].long(), row, right=True)
    ends = bounds.long()[(sequence + 1).clamp(max=len(bounds) - 1)]
    return sequence, row - bounds.long()[sequence], ends - 1 - row


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
