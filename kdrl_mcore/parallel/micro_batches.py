"""Which sequences form a micro-batch: balanced over data-parallel ranks by tokens, and up to a limit of rows.

Plans are pure functions of the lengths and of which prompts are equal, so every rank computes the same one without
communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from kdrl_mcore.types import TokenIds


class Shape(NamedTuple):
    """A sequence without its tokens.

    Attributes:
        rollout: its index in the global batch.
        prompt, response: its numbers of tokens.
        shared: a key, equal for all sequences whose prompts may share rows; None if it shares nothing.
    """

    rollout: int
    prompt: int
    response: int
    shared: Hashable = None


def shapes_of(sequences: Iterable[tuple[int, TokenIds, TokenIds]], *, share_prompts: bool) -> list[Shape]:
    """The shapes of (index, prompt ids, response ids)."""
    return [
        Shape(index, len(prompt), len(response), prompt.tobytes() if share_prompts else None)
        for index, prompt, response in sequences
    ]


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
    shapes: Sequence[Shape], data_parallel: int, micro_tokens: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Assign sequences to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches (its last ones may be empty), as pipelines and expert parallelism need.
    No micro-batch exceeds `micro_tokens`, except that a single longer sequence forms a micro-batch alone. Sequences that may
    share their prompt's rows stay together as far as this limit and an equal load of the ranks allow.

    Args:
        micro_tokens: the limit for a whole micro-batch, which with context parallelism is that of its ranks together.
        multiple_of: round the number of micro-batches up to a multiple of this (interleaved pipelines).

    Returns:
        plan[rank][micro-batch] = positions in `shapes`, ascending.
    """
    bundles, lengths = _bundles(shapes, data_parallel, micro_tokens)
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
        per_rank.append([sorted(member for item in bin_ for member in bundles[item]) for bin_ in bins])
    count = max([1, *map(len, per_rank)])
    count = -(-count // multiple_of) * multiple_of
    return [bins + [[] for _ in range(count - len(bins))] for bins in per_rank]


def _bundles(shapes: Sequence[Shape], data_parallel: int, micro_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Sequences that one micro-batch takes together (positions in `shapes`), and the rows that each bundle needs."""
    bundles: list[list[int]] = []
    rows: list[int] = []
    alone, together = by_prompt(shapes)
    for position in alone:
        bundles.append([position])
        rows.append(shapes[position].prompt + shapes[position].response)
    total = sum(rows) + sum(
        shapes[members[0]].prompt + sum(shapes[member].response for member in members) for members in together
    )
    limit = min(micro_tokens, -(-total // data_parallel))
    for members in together:
        first = len(bundles)  # of this prompt
        for member in sorted(members, key=lambda position: (-shapes[position].response, position)):
            _, prompt, response, _ = shapes[member]
            fits = [bundle for bundle in range(first, len(bundles)) if rows[bundle] + response <= limit]
            if fits:
                target = min(fits, key=lambda bundle: rows[bundle])
                bundles[target].append(member)
                rows[target] += response
            else:
                bundles.append([member])
                rows.append(prompt + response)
    return bundles, rows


def by_prompt(shapes: Sequence[Shape]) -> tuple[list[int], list[list[int]]]:
    """Positions of the sequences that share their prompt with no other one, and those of the others, prompt by prompt."""
    members: dict[Hashable, list[int]] = {}
    for position, shape in enumerate(shapes):
        if shape.shared is not None and shape.response:
            members.setdefault(shape.shared, []).append(position)
    together = [positions for positions in members.values() if len(positions) > 1]
    sharing = {position for positions in together for position in positions}
    return [position for position in range(len(shapes)) if position not in sharing], together
