"""Pools of ranks on paper CUDA, and the models and data for their runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paper_cuda import choose_gpu, import_training
from tests.reference.tiny_models import make_model, make_pair, make_tokenizer
from tests.support.ranks import RankPool
from tests.support.training import PROMPTS


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size, preload=import_training, prepare=choose_gpu, backend="cpu:gloo,cuda:nccl")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def paper1() -> Iterator[RankPool]:
    """A world of one GPU."""
    yield from _pool(1)


@pytest.fixture(scope="session")
def paper2() -> Iterator[RankPool]:
    """A world of two GPUs."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def paper4() -> Iterator[RankPool]:
    """A world of four GPUs."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def papers(paper1: RankPool, paper2: RankPool, paper4: RankPool) -> dict[int, RankPool]:
    """The pools by size."""
    return {1: paper1, 2: paper2, 4: paper4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, a mixture of experts and prompts."""
    folder = make_pair(tmp_path_factory.mktemp("pair"), PROMPTS[:6])
    make_model("qwen3_moe", folder / "mixture", seed=11, vocab_size=100)
    make_tokenizer(folder / "mixture")
    return folder
