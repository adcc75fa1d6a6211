"""Transformer Engine's layers, played by the stand-in of `tests/stubs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.test_dense_agreement import Case, check
from tests.ranks import RankPool
from tests.te_ranks import STUBS, play_transformer_engine
from tests.zoo import Zoo


@pytest.fixture(scope="module")
def started() -> Iterator[RankPool]:
    pool = RankPool(2, import_first=[STUBS])
    yield pool
    pool.close()


@pytest.fixture
def te_ranks(started: RankPool) -> RankPool:
    started.run(play_transformer_engine)
    return started


LAYOUTS = {
    "tp2": Case(2, "parallel.tensor=2"),
    "tp2 sp": Case(2, "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=40"),
    "pp2": Case(2, "parallel.pipeline=2"),
    "cp2": Case(2, "parallel.context=2"),
    "dp2": Case(2, "batch.micro_tokens=40"),
    "tied, pp2 interleaved, recompute": Case(
        2, "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.recompute=full", student="tied"
    ),
    "one kv head": Case(2, "parallel.tensor=2", student="one_kv_head"),
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=list(LAYOUTS))
def test_dense(case: Case, zoo: Zoo, te_ranks: RankPool, tmp_path: Path) -> None:
    check(case, zoo, te_ranks, tmp_path)
