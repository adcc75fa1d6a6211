"""The rows of a micro-batch: its sequences packed one after the other, without padding between them.

Responses to one prompt can share its rows (`batch.share_prompts`): the prompt is computed once, and every response attends to
it and to itself. Log-probs and gradients are the same, because a causal model computes the same values for a prompt whatever
follows it, and the gradients of the responses add up in its keys and values.

S rows of the packed sequence (prompt and response tokens), T loss rows (response tokens). `micro_batches.py` decides which
sequences form a micro-batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdrl_mcore.parallel.micro_batches import Shape, by_prompt, shapes_of
from kdrl_mcore.parallel.platform import to_device
from kdrl_mcore.types import ExpertIds, TokenIds

UNKNOWN_EXPERT = -1
"""In place of the experts of a row that no sampler has read: its router chooses for itself."""


@dataclass(frozen=True)
class SequenceRun:
    """`count` sequences (or parts of them) of `length` queries each, adjacent from row `start`, for one attention call.

    Each attends to `key_length` keys, which begin at row `key_start` for the first one; its last query sees all of them. Keys
    are in the order of the whole micro-batch, or of its `key_rows`. Without context parallelism and shared prompts queries and
    keys are the same rows.
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
    """One micro-batch, or a context-parallel rank's part of it: shared prompts, then whole sequences and the responses to the
    shared prompts, shortest first, one after the other.

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
        key_rows: for each key, its row in the packed sequence of all ranks; None without shared prompts, where keys are in the
            order of the rows.
        experts_SLK: the experts that the sampler chose for each row, or `UNKNOWN_EXPERT`; None where the routers choose.
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
    key_rows: Tensor | None = None
    experts_SLK: Tensor | None = None

    def on_device(self) -> PackedBatch:
        """The same micro-batch on this rank's device."""
        names = ("tokens_S", "positions_S", "rows_T", "targets_T", "context_rows", "key_rows", "experts_SLK")
        tensors: dict[str, Any] = {name: to_device(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **tensors)


def pack(
    sequences: Sequence[tuple[int, TokenIds, TokenIds]],
    alignment: int,
    *,
    share_prompts: bool = False,
    scored: Mapping[int, int] | None = None,
    context_rank: int = 0,
    context_size: int = 1,
    experts: Mapping[int, ExpertIds] | None = None,
) -> PackedBatch:
    """Pack (index in the global batch, prompt ids, response ids) into one micro-batch.

    With context parallelism the packed sequence, not each sequence in it, is cut into 2 * `context_size` equal parts, and rank
    r holds parts r and 2 * context_size - 1 - r: since later parts see more keys, this balances attention over the ranks, and
    no sequence needs padding.

    Args:
        alignment: S is filled up to a multiple of this (with context parallelism itself a multiple of 2 * `context_size`). An
            empty micro-batch still has one filler sequence of this length, so that an idle rank takes part in every collective.
        share_prompts: responses to equal prompts share its rows.
        scored: how many tokens, the first ones, of a response the teacher scored, by index; their loss rows come first.
        experts: [prompt and response tokens - 1, L, K] by index. A shared prompt has those of one of its responses.
    """
    by_index = {index: (prompt, response) for index, prompt, response in sequences}
    rows = lay_out_rows(
        shapes_of(sequences, share_prompts=share_prompts),
        alignment,
        scored=scored,
        context_rank=context_rank,
        context_size=context_size,
    )
    tokens, positions = np.zeros(rows.total, dtype=np.int64), np.zeros(rows.total, dtype=np.int64)
    for segment in rows.segments:
        whole = np.concatenate(by_index[segment.rollout]) if segment.rollout is not None else np.zeros(segment.length, np.int64)
        inside = slice(len(segment.prefix), len(segment.prefix) + segment.length)
        tokens[segment.start : segment.stop] = whole[inside]
        positions[segment.start : segment.stop] = np.arange(inside.start, inside.stop)
    mine = _context_rows(rows.total, context_rank, context_size)
    chosen = None
    if experts is not None:
        chosen = np.full((rows.total, *next((each.shape[1:] for each in experts.values()), (0, 0))), UNKNOWN_EXPERT, np.int16)
        for segment in rows.segments:
            if segment.rollout is not None:
                first = len(segment.prefix)
                known = experts[segment.rollout][first : first + segment.length]
                chosen[segment.start : segment.start + len(known)] = known

    def flat(parts: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)

    return PackedBatch(
        tokens_S=flat([tokens[mine]]),
        positions_S=flat([positions[mine]]),
        runs=tuple(_runs(rows.segments, rows.total, context_rank, context_size)),
        rows_T=flat([predictors for _, predictors in rows.spans]),
        targets_T=flat([by_index[index][1][start:stop] for (index, start, stop), _ in rows.spans]),
        spans=tuple(span for span, _ in rows.spans),
        num_scored=sum(span.stop - span.start for span, _ in rows.spans if is_scored(span, scored)),
        order=rows.order,
        context_rows=flat([_context_rows(rows.total, rank, context_size) for rank in range(context_size)])
        if context_size > 1
        else None,
        key_rows=flat([segment.rows for segment in rows.segments])
        if any(segment.prefix for segment in rows.segments)
        else None,
        experts_SLK=None if chosen is None else torch.from_numpy(chosen[mine]),
    )


class Segment(NamedTuple):
    """Adjacent rows of the packed sequence: a whole sequence, a shared prompt, or a response to one.

    Attributes:
        rollout: the index of a rollout whose tokens these rows (after `prefix`) hold; None for the filler.
        start, length: its rows.
        prefix: the rows of the shared prompt that comes before them, if any.
    """

    rollout: int | None
    start: int
    length: int
    prefix: range = range(0)

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.length

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the prefix, then its own."""
        return np.concatenate((np.arange(self.prefix.start, self.prefix.stop), np.arange(self.start, self.stop)))


@dataclass(frozen=True)
class PackedRows:
    """Where a micro-batch's tokens lie.

    Attributes:
        order: the rollouts in the order of the packed sequence.
        segments: its parts, the filler included.
        spans: the loss rows that a context-parallel rank holds: a span of a response, and the rank's rows that predict its
            tokens.
    """

    order: tuple[int, ...]
    segments: tuple[Segment, ...]
    spans: tuple[tuple[Span, NDArray[np.int64]], ...]

    @property
    def total(self) -> int:
        """The number of rows of all context-parallel ranks."""
        return self.segments[-1].stop


def lay_out_rows(
    shapes: Sequence[Shape],
    alignment: int,
    *,
    scored: Mapping[int, int] | None = None,
    context_rank: int = 0,
    context_size: int = 1,
) -> PackedRows:
    """Where `pack` puts sequences of these shapes."""
    segments, order = _segments(shapes)
    total = segments[-1].stop if segments else 0
    filler = -total % alignment if total else alignment
    if filler:
        segments.append(Segment(None, total, filler))
    own_row = np.full(total + filler, -1)  # this rank's row for each row of the packed sequence; -1: on another rank
    mine = _context_rows(len(own_row), context_rank, context_size)
    own_row[mine] = np.arange(len(mine))
    last = {segment.rollout: segment for segment in segments}  # of each rollout: the segment with its response
    spans: list[tuple[Span, NDArray[np.int64]]] = []
    for index, prompt, response, _ in order:
        predictors = own_row[last[index].rows[prompt - 1 : prompt - 1 + response]]
        for start, stop in _stretches(predictors >= 0):
            cut = min(max((scored or {}).get(index, 0), start), stop)
            parts = [(begin, end) for begin, end in ((start, cut), (cut, stop)) if begin < end]
            spans += [(Span(index, begin, end), predictors[begin:end]) for begin, end in parts]
    spans.sort(key=lambda placed: not is_scored(placed[0], scored))
    return PackedRows(tuple(shape.rollout for shape in order), tuple(segments), tuple(spans))


def num_rows(shapes: Sequence[Shape]) -> int:
    """The rows that a micro-batch of these shapes needs, without filler."""
    segments, _ = _segments(shapes)
    return segments[-1].stop if segments else 0


def _segments(shapes: Sequence[Shape]) -> tuple[list[Segment], list[Shape]]:
    """Shared prompts, then sequences and responses by length; and the shapes in the order of the latter."""
    segments: list[Segment] = []
    prompts: dict[Hashable, range] = {}
    start = 0
    for shape in sorted((shapes[members[0]] for members in by_prompt(shapes)[1]), key=lambda one: (one.prompt, one.rollout)):
        segments.append(Segment(shape.rollout, start, shape.prompt))
        prompts[shape.shared] = range(start, start + shape.prompt)
        start += shape.prompt
    order = sorted(shapes, key=lambda shape: (shape.prompt + shape.response, shape.rollout))
    for shape in order:
        prefix = prompts.get(shape.shared, range(0)) if shape.response else range(0)
        length = shape.prompt + shape.response - len(prefix)
        segments.append(Segment(shape.rollout, start, length, prefix))
        start += length
    return segments, order


def is_scored(span: Span, scored: Mapping[int, int] | None) -> bool:
    """Whether the teacher scored the tokens of a span from `lay_out_rows`; it scored all of them or none."""
    return span.stop <= (scored or {}).get(span.rollout, 0)


def _context_parts(rows: int, rank: int, size: int) -> list[tuple[int, int]]:
    """The parts [start, stop) of the packed sequence that a context-parallel rank holds."""
    if size == 1:
        return [(0, rows)]
    length = rows // (2 * size)
    return [(part * length, (part + 1) * length) for part in (rank, 2 * size - 1 - rank)]


def _context_rows(rows: int, rank: int, size: int) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, stop) for start, stop in _context_parts(rows, rank, size)])


def _runs(segments: Sequence[Segment], total: int, rank: int, size: int) -> list[SequenceRun]:
    """The segments in this rank's parts; adjacent ones with the same numbers of queries and keys are one run."""
    key_starts = np.cumsum([0, *(len(segment.prefix) + segment.length for segment in segments)]).tolist()
    ends = [segment.stop for segment in segments]
    runs: list[SequenceRun] = []
    offset = 0  # of the part in this rank's rows
    for part_start, part_stop in _context_parts(total, rank, size):
        for number in range(int(np.searchsorted(ends, part_start, side="right")), len(segments)):
            segment = segments[number]
            if segment.start >= part_stop:
                break
            low, high = max(segment.start, part_start), min(segment.stop, part_stop)
            seen = len(segment.prefix) + high - segment.start
            run = SequenceRun(offset + low - part_start, 1, high - low, key_starts[number], seen)
            previous = runs[-1] if runs else None
            if (
                previous is not None
                and (previous.length, previous.key_length) == (run.length, run.key_length)
                and previous.start + previous.count * run.length == run.start
                and previous.key_start + previous.count * run.key_length == run.key_start
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
