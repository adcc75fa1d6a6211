"""The single call for a packed micro-batch: its arguments, and the kernel that gets them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.model.varlen import find_varlen, stretches
from kdrl_mcore.parallel.packing import PackedBatch, pack
from tests.support import varlen as played
from tests.support.ranks import RankPool

CUDA = torch.device("cuda")


def packed(lengths: list[int], rank: int = 0, size: int = 1, alignment: int = 1) -> PackedBatch:
    sequences = [(i, np.ones(1, np.int64), np.ones(length - 1, np.int64)) for i, length in enumerate(lengths)]
    return pack(sequences, 2 * size if size > 1 else alignment, context_rank=rank, context_size=size)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_whole_sequences_are_one_call_with_filler_and_all() -> None:
    (stretch,) = stretches(packed([7, 3, 3, 12], alignment=8).runs)
    assert (stretch.queries, stretch.keys) == (slice(0, 32), slice(0, 32))
    assert stretch.query_bounds.tolist() == stretch.key_bounds.tolist() == [0, 3, 6, 13, 25, 32]
    assert stretch.query_bounds.dtype == torch.int32
    assert (stretch.longest_query, stretch.longest_key) == (12, 12)


def test_an_empty_micro_batch_is_one_call_on_its_filler() -> None:
    (stretch,) = stretches(packed([], alignment=4).runs)
    assert stretch.query_bounds.tolist() == [0, 4]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[31], [5, 5, 5, 5, 4], [2, 3, 40], [24, 24], []], ids=str)
def test_a_context_parallel_rank_makes_a_call_for_each_part_at_most(lengths: list[int], size: int) -> None:
    """Together the ranges make up the runs: every query occurs once, with the keys up to its position."""
    for rank in range(size):
        batch = packed(lengths, rank, size)
        calls = stretches(batch.runs)
        assert len(calls) <= 2
        found = []
        for call in calls:
            assert call.query_bounds[-1] == call.queries.stop - call.queries.start
            assert call.key_bounds[-1] == call.keys.stop - call.keys.start
            assert call.longest_query == call.query_bounds.diff().max() and call.longest_key == call.key_bounds.diff().max()
            starts = zip(call.query_bounds[:-1].tolist(), call.key_bounds[:-1].tolist(), strict=True)
            sizes = zip(call.query_bounds.diff().tolist(), call.key_bounds.diff().tolist(), strict=True)
            found += [
                (call.queries.start + q, rows, call.keys.start + k, keys)
                for (q, k), (rows, keys) in zip(starts, sizes, strict=True)
            ]
        expected = [
            (run.start + i * run.length, run.length, run.key_start + i * run.length, run.key_length)
            for run in batch.runs
            for i in range(run.count)
        ]
        assert found == expected


def test_torch_has_what_is_asked_for_here() -> None:
    """The installed torch's function, for which the imitation stands in, accepts these arguments."""
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    assert list(signature(varlen_attn).parameters) == list(signature(played.varlen_attn).parameters)


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("source", ["torch", "flash-attn"])
@pytest.mark.usefixtures("hopper")
def test_kernels_are_asked_for_the_mask_scale_and_boundaries(
    source: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(source, monkeypatch)
    kernel = find_varlen(CUDA, torch.bfloat16, 8)
    assert kernel is not None
    (stretch,) = stretches(packed([2, 5]).runs)
    query, key, value = (torch.randn(7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = []
    for rows in (slice(0, 2), slice(2, 7)):
        q, k, v = (x[rows].transpose(0, 1) for x in (query, key, value))
        seen = torch.ones(q.size(1), q.size(1), dtype=torch.bool).tril()
        seen &= ~seen.tril(-(window or 99))
        expected.append(F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).transpose(0, 1))
    torch.testing.assert_close(kernel(query, key, value, stretch, 0.3, window), torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("hopper")
def test_without_a_kernel_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    use("torch", monkeypatch)
    assert find_varlen(CUDA, torch.bfloat16, 128) is not None
    assert find_varlen(CUDA, torch.float16, 256) is not None
    assert find_varlen(CUDA, torch.float32, 128) is None
    assert find_varlen(torch.device("cpu"), torch.bfloat16, 128) is None
    assert find_varlen(CUDA, torch.bfloat16, 20) is None
    assert find_varlen(CUDA, torch.bfloat16, 320) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert find_varlen(CUDA, torch.bfloat16, 128) is None


@pytest.mark.usefixtures("hopper")
def test_early_forms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's function has no grouped heads; flash-attn's first versions masked from the upper left."""
    use("flash-attn", monkeypatch)

    def early(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, is_causal: bool = False) -> None: ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", early, raising=False)
    assert find_varlen(CUDA, torch.bfloat16, 128) is not None  # flash-attn's
    monkeypatch.setattr("flash_attn.flash_attn_varlen_func", early)
    assert find_varlen(CUDA, torch.bfloat16, 128) is None


def attend_on_rank(lengths: list[int]) -> list[tuple[Any, ...]]:
    """The calls of the kernel in one layer's attention over a micro-batch."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.model import attention
    from kdrl_mcore.model.rope import RotaryFrequencies

    calls: list[tuple[Any, ...]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, stretch: Any, scale: float | None, window: int | None) -> Tensor:
        calls.append((len(query), len(key), stretch.query_bounds.tolist(), scale, window))
        return query

    batch = packed(lengths)
    with patch.object(attention.varlen, "find_varlen", lambda *_: kernel):
        frequencies = [RotaryFrequencies(torch.ones(4), 1.0)]
        sequences = attention.pack_attention(batch.runs, batch.positions_S, frequencies, torch.bfloat16, 8)
    query, key, value = (torch.zeros(sum(lengths), heads, 8) for heads in (4, 2, 2))
    attention.PackedDotProductAttention(None, softmax_scale=0.3, window=4)(query, key, value, None, packed_seq_params=sequences)
    return calls


def test_a_micro_batch_is_one_call(ranks1: RankPool) -> None:
    """If there is a kernel; run by run there would be three calls."""
    assert ranks1.run(attend_on_rank, [7, 3, 3, 12]) == [[(25, 25, [0, 3, 6, 13, 25], 0.3, 4)]]


def use(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this library the only one with a kernel."""
    flash_attn: Any = ModuleType("flash_attn")
    if source == "flash-attn":
        flash_attn.flash_attn_varlen_func = played.flash_attn_varlen_func
        monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", played.varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
