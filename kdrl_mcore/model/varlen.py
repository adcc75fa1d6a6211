"""Causal attention over sequences of any lengths in one call, where torch or flash-attn has a kernel for it.

Such a kernel takes packed rows and the boundaries of the sequences in them. Its causal mask is aligned to the lower right: the
last query of a sequence sees all of its keys. Q query rows, F key rows, N query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdrl_mcore.parallel.packing import SequenceRun
from kdrl_mcore.parallel.platform import to_device

_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class Stretch:
    """Adjacent sequences whose keys are adjacent too, so that one call handles them.

    Attributes:
        queries: the rows of their queries.
        keys: the rows of their keys, in the order of the whole micro-batch.
        query_bounds, key_bounds: where each sequence begins in those rows, and where the last one ends: int32 [sequences + 1].
        longest_query, longest_key: rows of the longest sequence.
    """

    queries: slice
    keys: slice
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int


class VarlenAttention(Protocol):
    """(queries [Q, N, D], keys [F, K, D], values [F, K, D], their stretch, scale, keys that a query sees) -> [Q, N, D]."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, stretch: Stretch, scale: float | None, window: int | None
    ) -> Tensor: ...


def find_varlen(device: torch.device, dtype: torch.dtype, head_dimension: int) -> VarlenAttention | None:
    """The kernel for such queries, torch's in preference to flash-attn's; None if there is none: on CPU, in float32, and for
    heads or GPUs that FlashAttention does not support."""
    fits = head_dimension % _HEAD_MULTIPLE == 0 and head_dimension <= _LARGEST_HEAD
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not fits:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return _torch_varlen() or _flash_attn_varlen()


def _torch_varlen() -> VarlenAttention | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # torch 2.10 and 2.11 have an earlier signature without grouped heads.
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, stretch: Stretch, scale: float | None, window: int | None) -> Tensor:
        output = varlen_attn(
            query,
            key,
            value,
            stretch.query_bounds,
            stretch.key_bounds,
            stretch.longest_query,
            stretch.longest_key,
            scale=scale,
            window_size=(_keys_before(window), 0),  # none after a query's own
            enable_gqa=True,
        )
        assert isinstance(output, Tensor)  # a tuple only with `return_aux`
        return output

    return attend


def _keys_before(window: int | None) -> int:
    """How many keys before its own a query sees, as kernels count them: -1 for all."""
    return -1 if window is None else window - 1


def _flash_attn_varlen() -> VarlenAttention | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    # Releases with this argument align the mask to the lower right.
    if "deterministic" not in inspect.signature(flash_attn_varlen_func).parameters:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, stretch: Stretch, scale: float | None, window: int | None) -> Tensor:
        output: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            stretch.query_bounds,
            stretch.key_bounds,
            stretch.longest_query,
            stretch.longest_key,
            softmax_scale=scale,
            causal=True,
            window_size=(_keys_before(window), 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    return attend


def stretches(runs: Sequence[SequenceRun]) -> tuple[Stretch, ...]:
    """The calls that cover all runs: one, or under context parallelism one for each of the rank's two parts where a sequence
    spans both, because both need its first keys.

    All boundaries go to the device in one copy, which the host does not wait for.
    """
    parts: list[list[SequenceRun]] = []
    for run in runs:
        if parts and run.key_start == _end_of_keys(parts[-1][-1]):
            parts[-1].append(run)
        else:
            parts.append([run])
    lengths: list[list[int]] = []  # for each part, the lengths of its sequences' queries, then of their keys
    for part in parts:
        lengths.append([run.length for run in part for _ in range(run.count)])
        lengths.append([run.key_length for run in part for _ in range(run.count)])
    bounds = [torch.tensor([0, *each]).cumsum(0) for each in lengths]
    on_device = to_device(torch.cat(bounds).int()).split([len(each) for each in bounds])
    return tuple(
        Stretch(
            queries=slice(part[0].start, part[-1].start + part[-1].count * part[-1].length),
            keys=slice(part[0].key_start, _end_of_keys(part[-1])),
            query_bounds=on_device[index],
            key_bounds=on_device[index + 1],
            longest_query=max(lengths[index]),
            longest_key=max(lengths[index + 1]),
        )
        for index, part in zip(range(0, len(lengths), 2), parts, strict=True)
    )


def _end_of_keys(run: SequenceRun) -> int:
    """One past the last key of a run."""
    return run.key_start + run.count * run.key_length
