"""From rollouts to micro-batches: balanced over data-parallel ranks by tokens, packed without padding between sequences.

S rows of the packed sequence (prompt and response tokens), T loss rows (response tokens). Every function here is a pure
function of the lengths, so every rank computes the same plan without communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdrl_mcore.types import TokenIds


@dataclass(frozen=True)
class Run:
    """`count` sequences of equal `length`, adjacent in the packed sequence from row `start`: one attention call serves them
    all."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: whole sequences, shortest first, one after the other.

    Attributes:
        tokens_S: token ids; the tail that aligns S is a sequence of its own that no loss row refers to.
        positions_S: position of each token in its sequence.
        runs: the sequences, grouped by equal length.
        rows_T: the row whose hidden state predicts each response token.
        targets_T: the response tokens.
        spans: for each rollout in the micro-batch, (index in the global batch, first and last + 1 of its loss rows).
    """

    tokens_S: Tensor
    positions_S: Tensor
    runs: tuple[Run, ...]
    rows_T: Tensor
    targets_T: Tensor
    spans: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device) -> PackedBatch:
        """The same micro-batch on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens_S", "positions_S", "rows_T", "targets_T")
        }
        return PackedBatch(runs=self.runs, spans=self.spans, **moved)


def partition(weights: Sequence[int], bins: int) -> list[list[int]]:
    """Spread items over bins so that the heaviest bin is light: longest first, each to the lightest bin so far.

    Returns:
        The item indices of each bin, each list ascending. Bins may be empty.
    """
    heap = [(0, index) for index in range(bins)]
    result: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        total, index = heapq.heappop(heap)
        result[index].append(item)
        heapq.heappush(heap, (total + weights[item], index))
    return [sorted(items) for items in result]


def plan_micro_batches(
    lengths: Sequence[int], data_parallel: int, micro_tokens: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Assign sequences to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches (its last ones may be empty), as pipelines and expert parallelism need.
    No micro-batch exceeds `micro_tokens`, except that a single longer sequence forms a micro-batch alone.

    Args:
        lengths: prompt + response tokens of each sequence.
        multiple_of: round the number of micro-batches up to a multiple of this (interleaved pipelines).

    Returns:
        plan[rank][micro-batch] = sequence indices, ascending.
    """
    per_rank = []
    for items in partition(lengths, data_parallel):
        bins: list[list[int]] = []
        totals: list[int] = []
        for item in sorted(items, key=lambda index: (-lengths[index], index)):
            fits = [index for index, total in enumerate(totals) if total + lengths[item] <= micro_tokens]
            if fits:
                target = min(fits, key=lambda index: totals[index])
                bins[target].append(item)
                totals[target] += lengths[item]
            else:
                bins.append([item])
                totals.append(lengths[item])
        per_rank.append([sorted(bin_) for bin_ in bins])
    count = max([1, *map(len, per_rank)])
    count = -(-count // multiple_of) * multiple_of
    return [bins + [[] for _ in range(count - len(bins))] for bins in per_rank]


def pack(sequences: Sequence[tuple[int, TokenIds, TokenIds]], alignment: int) -> PackedBatch:
    """Pack (index in the global batch, prompt ids, response ids) into one micro-batch.

    Args:
        alignment: S is filled up to a multiple of this; an empty micro-batch still has one aligned filler sequence, so that a
            rank with nothing to do stays in every collective.
    """
    ordered = sorted(sequences, key=lambda item: (len(item[1]) + len(item[2]), item[0]))
    tokens, positions, rows, targets = [], [], [], []
    runs: list[Run] = []
    spans: list[tuple[int, int, int]] = []
    start = num_rows = 0
    for index, prompt, response in ordered:
        length = len(prompt) + len(response)
        tokens += [prompt, response]
        positions.append(np.arange(length))
        rows.append(np.arange(start + len(prompt) - 1, start + length - 1))
        targets.append(response)
        spans.append((index, num_rows, num_rows + len(response)))
        num_rows += len(response)
        if runs and runs[-1].length == length:
            runs[-1] = Run(runs[-1].start, runs[-1].count + 1, length)
        else:
            runs.append(Run(start, 1, length))
        start += length
    filler = -start % alignment if start else alignment
    if filler:
        tokens.append(np.zeros(filler, dtype=np.int64))
        positions.append(np.arange(filler))
        runs.append(Run(start, 1, filler))

    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)

    return PackedBatch(flat(tokens), flat(positions), tuple(runs), flat(rows), flat(targets), tuple(spans))
