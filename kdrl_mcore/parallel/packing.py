"""From rollouts to micro-batches: balanced over data-parallel ranks by tokens, packed without padding between sequences.

S rows of the packed sequence (prompt and response tokens), T loss rows (response tokens). Plans are pure functions of the
lengths, so every rank computes the same one without communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdrl_mcore.parallel.platform import to_device
from kdrl_mcore.types import TokenIds


@dataclass(frozen=True)
class SequenceRun:
    """`count` sequences (or parts of them) of `length` queries each, adjacent from row `start`, for one attention call.

    Each attends to `key_length` keys, which begin at row `key_start` for the first one; its last query sees all of them. Keys
    are in the order of the whole micro-batch. Without context parallelism queries and keys are the same rows.
    """

    start: int
    count: int
    length: int
    key_start: int
    key_length: int

    @classmethod
    def whole(cls, start: int, count: int, length: int) -> SequenceRun:
        """`count` whole sequences of the same length."""
        return cls(start, count, length, start, length)


class Span(NamedTuple):
    """Tokens [start, stop) of a rollout's response; `rollout` is its index in the global batch."""

    rollout: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, or a context-parallel rank's part of it: whole sequences, shortest first, one after the other.

    Attributes:
        tokens_S: token ids; the tail that aligns S is a separate sequence that no loss row refers to.
        positions_S: position of each token in its sequence.
        runs: which tokens attend to which.
        rows_T: the row whose hidden state predicts each response token.
        targets_T: the response tokens.
        spans: the loss rows in order, as spans of responses.
        num_scored: how many loss rows the teacher scored; these come first.
        order: the rollouts in the order of the packed sequence.
        context_rows: indices of the packed sequence's rows in the order in which context-parallel ranks hold them; None
            without context parallelism.
    """

    tokens_S: Tensor
    positions_S: Tensor
    runs: tuple[SequenceRun, ...]
    rows_T: Tensor
    targets_T: Tensor
    spans: tuple[Span, ...]
    num_scored: int
    order: tuple[int, ...]
    context_rows: Tensor | None = None

    def on_device(self) -> PackedBatch:
        """The same micro-batch on this rank's device."""
        names = ("tokens_S", "positions_S", "rows_T", "targets_T", "context_rows")
        tensors: dict[str, Any] = {name: to_device(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **tensors)


def partition(weights: Sequence[int], bins: int) -> list[list[int]]:
    """Distribute items over bins of nearly equal weight: heaviest first, each to the lightest bin so far.

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
        micro_tokens: the limit for a whole micro-batch, which with context parallelism is that of its ranks together.
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


def pack(
    sequences: Sequence[tuple[int, TokenIds, TokenIds]],
    alignment: int,
    *,
    scored: Mapping[int, int] | None = None,
    context_rank: int = 0,
    context_size: int = 1,
) -> PackedBatch:
    """Pack (index in the global batch, prompt ids, response ids) into one micro-batch.

    With context parallelism the packed sequence, not each sequence in it, is cut into 2 * `context_size` equal parts, and rank
    r holds parts r and 2 * context_size - 1 - r: since later parts see more keys, this balances attention over the ranks, and
    no sequence needs padding.

    Args:
        alignment: S is filled up to a multiple of this (with context parallelism itself a multiple of 2 * `context_size`). An
            empty micro-batch still has one filler sequence of this length, so that an idle rank takes part in every collective.
        scored: how many tokens, the first ones, of a response the teacher scored, by index; their loss rows come first.
    """
    by_index = {index: (prompt, response) for index, prompt, response in sequences}
    rows = place_rows(
        [(index, len(prompt), len(response)) for index, prompt, response in sequences],
        alignment,
        scored=scored,
        context_rank=context_rank,
        context_size=context_size,
    )
    filler = np.zeros(rows.lengths[-1] if len(rows.lengths) > len(rows.order) else 0, dtype=np.int64)
    tokens = np.concatenate([*(part for index in rows.order for part in by_index[index]), filler])
    positions = np.concatenate([np.arange(length) for length in rows.lengths])
    mine = _context_rows(len(tokens), context_rank, context_size)

    def flat(parts: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)

    return PackedBatch(
        tokens_S=flat([tokens[mine]]),
        positions_S=flat([positions[mine]]),
        runs=tuple(_runs(rows.lengths, context_rank, context_size)),
        rows_T=flat([np.arange(row, row + stop - start) for (_, start, stop), row in rows.spans]),
        targets_T=flat([by_index[index][1][start:stop] for (index, start, stop), _ in rows.spans]),
        spans=tuple(span for span, _ in rows.spans),
        num_scored=sum(span.stop - span.start for span, _ in rows.spans if is_scored(span, scored)),
        order=rows.order,
        context_rows=flat([_context_rows(len(tokens), rank, context_size) for rank in range(context_size)])
        if context_size > 1
        else None,
    )


@dataclass(frozen=True)
class Places:
    """Where a micro-batch's tokens lie.

    Attributes:
        order: the rollouts in the order of the packed sequence.
        lengths: the lengths of its sequences, the filler included.
        spans: the loss rows that a context-parallel rank holds: a span of a response, and the rank's row for its first token.
    """

    order: tuple[int, ...]
    lengths: tuple[int, ...]
    spans: tuple[tuple[Span, int], ...]


def place_rows(
    shapes: Sequence[tuple[int, int, int]],
    alignment: int,
    *,
    scored: Mapping[int, int] | None = None,
    context_rank: int = 0,
    context_size: int = 1,
) -> Places:
    """Where `pack` puts sequences of these (index, prompt tokens, response tokens), without the tokens themselves."""
    ordered = sorted(shapes, key=lambda shape: (shape[1] + shape[2], shape[0]))
    lengths = [prompt + response for _, prompt, response in ordered]
    total = sum(lengths)
    filler = -total % alignment if total else alignment
    starts = dict(zip((shape[0] for shape in ordered), np.cumsum([0, *lengths]).tolist(), strict=False))
    if filler:
        lengths.append(filler)
    place = np.full(total + filler, -1)  # this rank's row for each row of the packed sequence; -1: on another rank
    mine = _context_rows(len(place), context_rank, context_size)
    place[mine] = np.arange(len(mine))
    spans: list[tuple[Span, int]] = []
    for index, prompt, response in ordered:
        first = starts[index] + prompt - 1
        predictors = place[first : first + response]
        for start, stop in _stretches(predictors >= 0):
            cut = min(max((scored or {}).get(index, 0), start), stop)
            pieces = [(begin, end) for begin, end in ((start, cut), (cut, stop)) if begin < end]
            spans += [(Span(index, begin, end), int(predictors[begin])) for begin, end in pieces]
    spans.sort(key=lambda placed: not is_scored(placed[0], scored))
    return Places(tuple(shape[0] for shape in ordered), tuple(lengths), tuple(spans))


def is_scored(span: Span, scored: Mapping[int, int] | None) -> bool:
    """Whether the teacher scored the tokens of a span of `place_rows`, of which it scored all or none."""
    return span.stop <= (scored or {}).get(span.rollout, 0)


def _context_parts(rows: int, rank: int, size: int) -> list[tuple[int, int]]:
    """The parts [start, stop) of the packed sequence that a context-parallel rank holds."""
    if size == 1:
        return [(0, rows)]
    length = rows // (2 * size)
    return [(part * length, (part + 1) * length) for part in (rank, 2 * size - 1 - rank)]


def _context_rows(rows: int, rank: int, size: int) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, stop) for start, stop in _context_parts(rows, rank, size)])


def _runs(lengths: Sequence[int], rank: int, size: int) -> list[SequenceRun]:
    """The sequences in this rank's parts; adjacent whole sequences of the same length are one run."""
    starts = np.cumsum([0, *lengths])
    runs: list[SequenceRun] = []
    offset = 0  # of the part in this rank's rows
    for part_start, part_stop in _context_parts(int(starts[-1]), rank, size):
        first = int(np.searchsorted(starts, part_start, side="right")) - 1
        for begin, end in zip(starts[first:-1].tolist(), starts[first + 1 :].tolist(), strict=True):
            if begin >= part_stop:
                break
            low, high = max(begin, part_start), min(end, part_stop)
            run = SequenceRun(offset + low - part_start, 1, high - low, begin, high - begin)
            previous = runs[-1] if runs else None
            whole = run.length == run.key_length
            if (
                previous is not None
                and whole
                and (previous.length, previous.key_length) == (run.length, run.length)
                and previous.start + previous.count * run.length == run.start
                and previous.key_start + previous.count * run.length == run.key_start
            ):
                runs[-1] = replace(previous, count=previous.count + 1)
            else:
                runs.append(run)
        offset += part_stop - part_start
    return runs


def _stretches(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
