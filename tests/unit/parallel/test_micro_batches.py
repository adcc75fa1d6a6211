"""Plans of micro-batches lose no token and keep their limits. These are properties of randomly drawn batches."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_mcore.parallel.micro_batches import Shape, partition, plan_micro_batches, shapes_of
from tests.support.packing import grouped, groups, pack_all

properties = settings(max_examples=150, deadline=None)

plans = {
    "tokens": st.lists(st.integers(1, 50), max_size=30),
    "data_parallel": st.integers(1, 5),
    "micro_tokens": st.integers(1, 120),
    "multiple_of": st.integers(1, 4),
}


def alone(tokens: list[int]) -> list[Shape]:
    return [Shape(index, 0, length) for index, length in enumerate(tokens)]


@properties
@given(**plans)
def test_a_plan_loses_nothing_and_keeps_its_limits(
    tokens: list[int], data_parallel: int, micro_tokens: int, multiple_of: int
) -> None:
    plan = plan_micro_batches(alone(tokens), data_parallel, micro_tokens, multiple_of)
    assert len(plan) == data_parallel
    assert sorted(item for batches in plan for items in batches for item in items) == list(range(len(tokens)))
    counts = {len(batches) for batches in plan}
    assert len(counts) == 1 and min(counts) > 0 and min(counts) % multiple_of == 0
    for batches in plan:
        for items in batches:
            assert items == sorted(items)
            assert sum(tokens[item] for item in items) <= micro_tokens or len(items) == 1


@properties
@given(**plans)
def test_no_plan_has_needless_micro_batches(tokens: list[int], data_parallel: int, micro_tokens: int, multiple_of: int) -> None:
    """Two micro-batches of one rank would not fit into one, and a multiple is not exceeded."""
    plan = plan_micro_batches(alone(tokens), data_parallel, micro_tokens, multiple_of)
    filled = [[sum(tokens[item] for item in items) for items in batches if items] for batches in plan]
    assert len(plan[0]) < max(1, *map(len, filled)) + multiple_of
    for sums in filled:
        assert all(a + b > micro_tokens for a, b in pairwise(sorted(sums)))


@properties
@given(drawn=groups, data_parallel=st.integers(1, 5), micro_tokens=st.integers(1, 40), multiple_of=st.integers(1, 3))
def test_a_plan_with_shared_prompts_loses_nothing_and_keeps_its_limits(
    drawn: list[tuple[int, list[int]]], data_parallel: int, micro_tokens: int, multiple_of: int
) -> None:
    given = grouped(drawn)
    plan = plan_micro_batches(shapes_of(given, share_prompts=True), data_parallel, micro_tokens, multiple_of)
    assert len(plan) == data_parallel and len({len(batches) for batches in plan}) == 1
    assert sorted(item for batches in plan for items in batches for item in items) == list(range(len(given)))
    for batches in plan:
        for items in batches:
            (batch,) = pack_all([given[item] for item in items], 1, share_prompts=True)
            assert len(items) <= 1 or len(batch.tokens_S) <= micro_tokens


def test_a_group_stays_together_unless_a_rank_or_a_micro_batch_would_have_too_much() -> None:
    shapes = shapes_of(grouped([(5, [5] * 4), (5, [5] * 4)]), share_prompts=True)
    sizes = {
        (ranks, tokens): [sorted(len(items) for items in batches) for batches in plan_micro_batches(shapes, ranks, tokens)]
        for ranks, tokens in ((1, 50), (2, 50), (4, 50), (1, 15))
    }
    assert sizes == {(1, 50): [[8]], (2, 50): [[4], [4]], (4, 50): [[2]] * 4, (1, 15): [[2, 2, 2, 2]]}


@properties
@given(weights=st.lists(st.integers(0, 100), max_size=40), bins=st.integers(1, 6))
def test_a_partition_is_within_its_heaviest_item_of_even(weights: list[int], bins: int) -> None:
    parts = partition(weights, bins)
    assert sorted(item for part in parts for item in part) == list(range(len(weights)))
    loads = [sum(weights[item] for item in part) for part in parts]
    assert max(loads) - min(loads) <= max(weights, default=0)
