"""What all tests share: pools of ranks, started when first used and kept for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


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
