"""The prompt stream: order, epochs, resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import DataError
from kdrl_mcore.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), str(i), np.array([i]), str(i)) for i in range(count)]


def names(batch: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in batch]


@given(count=st.integers(1, 12), batch_size=st.integers(1, 30), seed=st.integers(0, 5), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_epoch_gives_each_prompt_once(count: int, batch_size: int, seed: int, shuffle: bool) -> None:
    stream = PromptStream(prompts(count), batch_size, seed, shuffle)
    given_names = [name for _ in range(2 + 3 * count // batch_size) for name in names(stream.next_batch())]
    for begin in range(0, len(given_names) - count + 1, count):
        assert Counter(given_names[begin : begin + count]) == Counter(map(str, range(count)))


@given(steps=st.integers(0, 9), batch_size=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_a_resumed_stream_goes_on_identically(steps: int, batch_size: int) -> None:
    whole, resumed = (PromptStream(prompts(7), batch_size, 3, True) for _ in range(2))
    for _ in range(steps):
        whole.next_batch()
    resumed.load_state_dict(whole.state_dict())
    assert [names(whole.next_batch()) for _ in range(5)] == [names(resumed.next_batch()) for _ in range(5)]


def test_order_depends_on_seed_and_epoch_only() -> None:
    def epochs(seed: int, batch_size: int) -> list[str]:
        stream = PromptStream(prompts(50), batch_size, seed, True)
        return [name for _ in range(100 // batch_size) for name in names(stream.next_batch())]

    assert epochs(1, 10) == epochs(1, 20)
    assert epochs(1, 10) != epochs(2, 10)
    assert epochs(1, 10)[:50] != epochs(1, 10)[50:]


def test_without_shuffle_the_order_is_the_data_sets() -> None:
    stream = PromptStream(prompts(3), 4, 1, False)
    assert [names(stream.next_batch()) for _ in range(2)] == [["0", "1", "2", "0"], ["1", "2", "0", "1"]]


def test_a_state_of_another_data_set_is_an_error() -> None:
    state = PromptStream(prompts(3), 2, 1, True).state_dict()
    with pytest.raises(DataError, match=r"data\.train has 4 prompts, the checkpoint was made with 3"):
        PromptStream(prompts(4), 2, 1, True).load_state_dict(state)
