"""A response ends with the first token whose text completes a stop string, wherever it is cut into parts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.rollout.stops import StopsOfBatch, StopStrings
from tests.reference.tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte, and some longer ones."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, all_bytes=True, extra_tokens=["STOP", "b\n\nc", "<|turn|>"])
    return load_tokenizer(folder)


def first_end(tokenizer: Tokenizer, ids: list[int], strings: list[str]) -> int | None:
    """By decoding every beginning as a whole."""
    texts = (tokenizer.fast.decode(ids[:count], skip_special_tokens=False) for count in range(1, len(ids) + 1))
    return next((count for count, text in enumerate(texts, start=1) if any(each in text for each in strings)), None)


@pytest.mark.parametrize("strings", [["ab"], ["\n\n", "é"], ["aé", "TO", "ba\n"], ["<|turn|>"], ["never so"]])
def test_a_response_ends_with_the_token_that_completes_the_text(tokenizer: Tokenizer, strings: list[str]) -> None:
    """For random sequences, among them bytes that are no UTF-8; in parts, the parts before the last complete none."""
    (turn,) = tokenizer.encode(["<|turn|>"], special_tokens=False)
    longer = [int(turn[0]) - 2, int(turn[0]) - 1, int(turn[0])]
    letters = [int(ids[0]) for ids in tokenizer.encode(["a", "b", "\n"], special_tokens=False)]
    two_bytes = tokenizer.encode(["é"], special_tokens=False)[0].tolist()
    stops, random, found = StopStrings(tokenizer.fast, strings), Random(3), 0
    for _ in range(300):
        ids: list[int] = []
        for _ in range(random.randrange(1, 12)):
            kind = random.random()
            ids += [random.choice(letters)] if kind < 0.6 else two_bytes[: random.choice((1, 2, 2))]
            ids += [random.choice(longer)] if kind > 0.85 else []
        expected = first_end(tokenizer, ids, strings)
        assert stops.begin().read(ids) == expected
        found += expected is not None
        cut = random.randrange(len(ids))
        if expected is None or expected > cut:
            rest = stops.begin(ids[:cut]).read(ids[cut:])
            assert rest == (None if expected is None else expected - cut)
    assert (found > 20) == (strings != ["never so"])


def test_what_comes_after_the_end_of_sequence_or_the_limit_ends_nothing(tokenizer: Tokenizer) -> None:
    a, b = (int(ids[0]) for ids in tokenizer.encode(["a", "b"], special_tokens=False))
    texts = [StopStrings(tokenizer.fast, ["ab"]).begin(begun) for begun in ([], [a], [], [], [])]
    batch = StopsOfBatch(texts, [6, 6, 6, 3, 6], {0})
    assert batch.read([0, 1, 2, 3], np.array([[a, a], [b, b], [a, 0], [b, b]])) == [False, True, False, False]
    assert batch.read([4], np.array([[b, b, b]])) == [False]
    rest = np.array([[b, b, a], [a, b, b], [a, b, a], [a, b, b], [a, b, 0]])
    assert batch.read([0, 1, 2, 3, 4], rest) == [True, True, False, False, True]
    assert batch.ends == {0: 3, 1: 1, 4: 5}
