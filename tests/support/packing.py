"""Random prompts and responses, and their packing on every context rank, for the tests of packing and of its plans."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kdrl_mcore.parallel.packing import PackedBatch, pack

Sequence = tuple[int, np.ndarray, np.ndarray]
Lengths = list[tuple[int, int]]
"""(prompt tokens, response tokens) of each sequence."""

groups = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), max_size=5)
"""(prompt tokens, tokens of each response to it)."""


def sequences(shapes: Lengths) -> list[Sequence]:
    """Rollouts numbered 0, 2, 4, ... whose tokens are all different."""
    tokens = iter(np.split(np.arange(1, 1 + sum(p + r for p, r in shapes)), np.cumsum([p + r for p, r in shapes])))
    return [(2 * i, *np.split(next(tokens), [prompt])) for i, (prompt, _) in enumerate(shapes)]


def grouped(drawn: list[tuple[int, list[int]]]) -> list[Sequence]:
    """Sequences in groups with equal prompts; the groups are mixed, and all other tokens are different."""
    prompts = [prompt for prompt, responses in drawn for _ in responses]
    lengths = [length for _, responses in drawn for length in responses]
    number = [group for group, (_, responses) in enumerate(drawn) for _ in responses]
    result = []
    for (index, prompt, response), group in zip(sequences(list(zip(prompts, lengths, strict=True))), number, strict=True):
        result.append((index, 1000 * (group + 1) + np.arange(len(prompt)), response))
    return [*result[::2], *result[1::2]]


def pack_all(given: list[Sequence], context: int, tensor: int = 1, **settings: Any) -> list[PackedBatch]:
    alignment = (2 * context if context > 1 else 1) * tensor
    return [pack(given, alignment, context_rank=rank, context_size=context, **settings) for rank in range(context)]
