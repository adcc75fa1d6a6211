"""The planner's memory of a rank is what a real student holds, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.planning.memory import plan_memory
from kdrl_mcore.planning.setup import make_setup, shard_requests
from kdrl_mcore.planning.shards import get_shards
from kdrl_mcore.planning.workload import Workload
from tests.planned_memory import PROMPT, measure_on_rank, write_model
from tests.ranks import RankPool

TOKENS, MICRO_BATCHES = 512, 4
LAYOUTS = {
    "data": [],
    "tensor, sequence, bfloat16": ["parallel.tensor=2", "parallel.sequence_parallel=true", "model.dtype=bfloat16"],
    "pipeline, bfloat16, recompute": ["parallel.pipeline=2", "parallel.recompute=full", "model.dtype=bfloat16"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "not distributed": ["parallel.distributed_optimizer=false"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("planned") / "model")


def config_of(layout: str, model: Path) -> tuple[list[str], Config]:
    overrides = ["objective=sft", f"student.path={model}", f"batch.micro_tokens={TOKENS}", *LAYOUTS[layout]]
    return overrides, load_config(overrides)


@pytest.fixture(scope="module", autouse=True)
def built(model: Path) -> None:
    """One faked world for all layouts."""
    configs = [config_of(layout, model)[1] for layout in LAYOUTS]
    get_shards([request for config in configs for request in shard_requests(config, 2).values()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_memory_is_within_a_tenth_of_live_tensors(layout: str, model: Path, ranks2: RankPool) -> None:
    overrides, config = config_of(layout, model)
    parallel = config.parallel
    data = 2 // (parallel.tensor * parallel.pipeline * parallel.context)
    length = TOKENS * parallel.context - PROMPT
    workload = Workload(MICRO_BATCHES * data, PROMPT, length, length)
    planned = plan_memory(make_setup(config, workload, world=2))
    for measured in ranks2.run(measure_on_rank, overrides, TOKENS, MICRO_BATCHES):
        rank = planned[measured.stage]
        print(layout, measured, rank.between_steps, rank.peak, rank.peak / measured.peak - 1)
        assert rank.between_steps == pytest.approx(measured.between, rel=0.02)
        assert rank.peak == pytest.approx(measured.peak, rel=0.10)
