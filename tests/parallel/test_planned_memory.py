"""The planner's memory for a rank is what a real student holds, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import configure, measure_on_rank, plan, without, write_model
from kdrl_mcore.planning.memory import GLOO_COPY
from kdrl_mcore.planning.setup import shard_requests
from kdrl_mcore.planning.shards import get_shards
from tests.support.ranks import RankPool

TOKENS, MICRO_BATCHES = 512, 4
MEASURED = (
    "data",
    "tensor, sequence, bfloat16",
    "pipeline, recompute, bfloat16",
    "pipeline, bfloat16",
    "pipeline, mlp recomputed, bfloat16",
    "tensor, sequence, norms and attention recomputed, bfloat16",
    "interleaved pipeline",
    "data, not distributed",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("planned") / "model", hidden=256, layers=4, vocab=4096)


@pytest.fixture(scope="module", autouse=True)
def built(model: Path) -> None:
    """One fake world for all layouts."""
    configs = [configure(layout, model, TOKENS)[1] for layout in MEASURED]
    get_shards([request for config in configs for request in shard_requests(config, 2).values()])


@pytest.mark.parametrize("layout", MEASURED)
def test_planned_memory_is_within_a_tenth_of_live_tensors(layout: str, model: Path, ranks2: RankPool) -> None:
    overrides, config = configure(layout, model, TOKENS)
    whole = plan(config, TOKENS, MICRO_BATCHES)
    for rank in whole:  # gloo reduces the distributed optimizer's gradients in a copy of its own
        by_kind = {item.kind: item.bytes for item in rank.items}
        assert by_kind.get(GLOO_COPY, 0) == by_kind["gradients"] * config.parallel.distributed_optimizer
    planned = [without(rank, (GLOO_COPY,)) for rank in whole]
    for measured in ranks2.run(measure_on_rank, overrides, TOKENS, MICRO_BATCHES):
        rank, live = planned[measured.stage], measured.live
        print(layout, measured, rank.between_steps, rank.peak, rank.peak / live.peak - 1)
        assert rank.between_steps == pytest.approx(live.between, rel=0.02)
        assert rank.peak == pytest.approx(live.peak, rel=0.10)
