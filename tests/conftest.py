"""Fixtures of all tests, made at first use and kept for the session: pools of ranks, and models to train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # in this process: threads that wait for each other on busy cores cost several times what they save

pytest.register_assert_rewrite("tests.support")

from tests.support.ranks import RankPool  # noqa: E402
from tests.support.zoo import Zoo, make_zoo  # noqa: E402


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    """A world of one rank."""
    yield from _pool(1)


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """A world of two ranks."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """A world of four ranks."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def pools(ranks1: RankPool, ranks2: RankPool, ranks4: RankPool) -> dict[int, RankPool]:
    """The pools of ranks by size."""
    return {1: ranks1, 2: ranks2, 4: ranks4}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Models and rollouts."""
    return make_zoo(tmp_path_factory.mktemp("zoo"))
