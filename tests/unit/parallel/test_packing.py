"""Packing puts every token on one rank, finds the predictor of every loss row, and lets a token attend to what a causal mask
allows. These are properties of randomly drawn batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_mcore.parallel.micro_batches import Shape
from kdrl_mcore.parallel.packing import PackedBatch, lay_out_rows
from tests.support.packing import Lengths, grouped, groups, pack_all, sequences

lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=8)
context_sizes = st.sampled_from([1, 2, 3, 4])
properties = settings(max_examples=150, deadline=None)


def pack_on_all_ranks(
    shapes: Lengths, context: int, tensor: int = 1, scored: dict[int, int] | None = None
) -> list[PackedBatch]:
    return pack_all(sequences(shapes), context, tensor, scored=scored)


def whole(batches: list[PackedBatch], name: str) -> torch.Tensor:
    """The ranks' rows in the order of the packed sequence."""
    rows = torch.cat([getattr(batch, name) for batch in batches])
    order = batches[0].context_rows
    return rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)


@properties
@given(shapes=lengths, context=context_sizes, tensor=st.sampled_from([1, 2]))
def test_every_token_is_on_exactly_one_rank(shapes: Lengths, context: int, tensor: int) -> None:
    batches = pack_on_all_ranks(shapes, context, tensor)
    sizes = {len(batch.tokens_S) for batch in batches}
    assert len(sizes) == 1 and min(sizes) % tensor == 0 and min(sizes) > 0
    tokens, positions = whole(batches, "tokens_S").tolist(), whole(batches, "positions_S").tolist()
    real = sum(prompt + response for prompt, response in shapes)
    assert sorted(tokens)[-real:] == list(range(1, real + 1)) if real else set(tokens) == {tokens[0]}
    assert len(tokens) - real < max(2, 2 * context * tensor) or not real  # less filler than one alignment
    by_index = {index: [*prompt.tolist(), *response.tolist()] for index, prompt, response in sequences(shapes)}
    packed = [token for index in batches[0].order for token in by_index[index]]
    assert tokens[:real] == packed
    assert positions[:real] == [position for index in batches[0].order for position in range(len(by_index[index]))]
    assert sorted(batches[0].order) == sorted(by_index)


@properties
@given(shapes=lengths, context=context_sizes, data=st.data())
def test_every_loss_row_is_on_the_rank_of_its_predictor_and_scored_ones_come_first(
    shapes: Lengths, context: int, data: st.DataObject
) -> None:
    scored = {2 * i: data.draw(st.integers(0, shape[1])) for i, shape in enumerate(shapes) if data.draw(st.booleans())}
    batches = pack_on_all_ranks(shapes, context, scored=scored)
    by_index = {index: (prompt, response) for index, prompt, response in sequences(shapes)}
    seen: list[tuple[int, int]] = []
    for batch in batches:
        rows = [(span.rollout, position) for span in batch.spans for position in range(span.start, span.stop)]
        assert len(rows) == len(batch.rows_T) == len(batch.targets_T)
        assert [position < scored.get(index, 0) for index, position in rows] == [
            row < batch.num_scored for row in range(len(rows))
        ]
        for (index, position), row, target in zip(rows, batch.rows_T.tolist(), batch.targets_T.tolist(), strict=True):
            prompt, response = by_index[index]
            assert target == response[position]
            assert batch.tokens_S[row] == [*prompt, *response][len(prompt) + position - 1]
        seen += rows
    assert len(seen) == len(set(seen))
    assert set(seen) == {(index, position) for index, (_, response) in by_index.items() for position in range(len(response))}


@properties
@given(shapes=lengths, context=context_sizes)
def test_lay_out_rows_is_what_pack_does(shapes: Lengths, context: int) -> None:
    """Ranks that send hidden states know where the other rank needs them."""
    scored = {0: 3, 4: 1}
    counts = [Shape(2 * i, prompt, response) for i, (prompt, response) in enumerate(shapes)]
    for rank, batch in enumerate(pack_on_all_ranks(shapes, context, scored=scored)):
        alignment = 2 * context if context > 1 else 1
        packed = lay_out_rows(counts, alignment, scored=scored, context_rank=rank, context_size=context)
        assert tuple(span for span, _ in packed.spans) == batch.spans
        assert packed.order == batch.order
        assert [row for _, rows in packed.spans for row in rows.tolist()] == batch.rows_T.tolist()


@settings(properties, max_examples=80)
@given(shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=6), context=context_sizes)
def test_runs_are_the_causal_mask_of_each_sequence(shapes: Lengths, context: int) -> None:
    batches = pack_on_all_ranks(shapes, context)
    size = sum(len(batch.tokens_S) for batch in batches)
    positions = whole(batches, "positions_S")
    sequence = (positions == 0).cumsum(0)
    before = torch.arange(size)
    expected = (sequence[:, None] == sequence[None]) & (before[None] <= before[:, None])
    masks = []
    for batch in batches:
        mask = torch.zeros(len(batch.tokens_S), size, dtype=torch.bool)
        served = torch.zeros(len(batch.tokens_S), dtype=torch.long)
        for run in batch.runs:
            for number in range(run.count):
                queries = slice(run.start + number * run.length, run.start + (number + 1) * run.length)
                keys = slice(run.key_start + number * run.key_length, run.key_start + (number + 1) * run.key_length)
                # the last query sees all keys of its run, each earlier one sees one fewer
                shape = torch.ones(run.length, run.key_length, dtype=torch.bool)
                mask[queries, keys] = shape.tril(run.key_length - run.length)
                served[queries] += 1
        assert (served == 1).all()
        starts = [run.start for run in batch.runs]
        assert starts == sorted(starts)  # attention joins its outputs in this order
        masks.append(mask)
    rows = torch.cat(masks)
    order = batches[0].context_rows
    assert torch.equal(rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows), expected)


@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize(
    ("shapes", "bound"),
    [([(100, 7900)], 1.01), ([(100, 900)] * 8, 1.01), ([(50, 400 * i) for i in range(1, 8)], 1.3)],
    ids=["one long sequence", "equal sequences", "uneven sequences"],
)
def test_attention_work_is_balanced_over_context_ranks(shapes: Lengths, bound: float, context: int) -> None:
    """The busiest rank's number of query-key pairs, divided by the mean."""
    work = [
        sum(run.count * (run.length * run.key_length - run.length * (run.length - 1) // 2) for run in batch.runs)
        for batch in pack_on_all_ranks(shapes, context)
    ]
    assert max(work) / np.mean(work) < bound


@settings(properties, max_examples=80)
@given(drawn=groups, context=context_sizes, data=st.data())
def test_with_shared_prompts_every_token_is_computed_once_and_sees_what_it_saw(
    drawn: list[tuple[int, list[int]]], context: int, data: st.DataObject
) -> None:
    """Each row attends to the tokens of its sequence up to itself, in order; each loss row has its predictor."""
    given = grouped(drawn)
    by_index = {index: (prompt, response) for index, prompt, response in given}
    scored = {index: data.draw(st.integers(0, len(response))) for index, (_, response) in by_index.items()}
    batches = pack_all(given, context, scored=scored, share_prompts=True)
    tokens = whole(batches, "tokens_S").tolist()
    real = sum(len(response) for _, response in by_index.values()) + sum(prompt for prompt, _ in drawn)
    alignment = 2 * context if context > 1 else 1
    assert len(tokens) == (-(-real // alignment) * alignment if real else alignment)
    key_rows = batches[0].key_rows
    assert (key_rows is None) == all(len(responses) == 1 for _, responses in drawn)
    order = key_rows.tolist() if key_rows is not None else list(range(len(tokens)))
    keys = [tokens[row] for row in order]
    seen: set[tuple[int, int]] = set()
    for batch in batches:
        attended: dict[int, list[int]] = {}
        for run in batch.runs:
            for number in range(run.count):
                for query in range(run.length):
                    start = run.key_start + number * run.key_length
                    visible = run.key_length - run.length + query + 1
                    attended[run.start + number * run.length + query] = keys[start : start + visible]
        assert list(attended) == list(range(len(batch.tokens_S)))
        for row, visible_tokens in attended.items():
            assert len(visible_tokens) == batch.positions_S[row] + 1 and visible_tokens[-1] == batch.tokens_S[row]
        rows = [(span.rollout, position) for span in batch.spans for position in range(span.start, span.stop)]
        for (index, position), row, target in zip(rows, batch.rows_T.tolist(), batch.targets_T.tolist(), strict=True):
            prompt, response = by_index[index]
            assert attended[row] == [*prompt, *response][: len(prompt) + position] and target == response[position]
        assert [position < scored[index] for index, position in rows] == [row < batch.num_scored for row in range(len(rows))]
        seen |= set(rows)
    assert seen == {(index, position) for index, (_, response) in by_index.items() for position in range(len(response))}


def test_responses_of_equal_length_to_shared_prompts_share_one_run() -> None:
    (batch,) = pack_all(grouped([(3, [2, 2, 4]), (3, [2, 2])]), 1, share_prompts=True)
    assert [(run.count, run.length, run.key_length) for run in batch.runs] == [(2, 3, 3), (4, 2, 5), (1, 4, 7)]


def test_prompts_without_responses_share_nothing() -> None:
    """The embedded engine has as many caches as prompts, even for equal prompts."""
    same = np.arange(3)
    (batch,) = pack_all([(0, same, same[:0]), (1, same, same[:0])], 1, share_prompts=True)
    assert len(batch.tokens_S) == 6 and batch.key_rows is None


def test_equal_sequences_share_one_run() -> None:
    (batch,) = pack_on_all_ranks([(3, 4), (2, 2), (5, 2)], 1)
    assert [(run.count, run.length) for run in batch.runs] == [(1, 4), (2, 7)]


def test_a_rank_without_sequences_still_has_tokens() -> None:
    for batch in pack_on_all_ranks([], 2, tensor=2):
        assert len(batch.tokens_S) == 4
        assert len(batch.rows_T) == 0 and batch.spans == ()


def test_a_context_rank_may_have_no_loss_row() -> None:
    assert [len(batch.rows_T) for batch in pack_on_all_ranks([(40, 2)], 4)] == [0, 2, 0, 0]
