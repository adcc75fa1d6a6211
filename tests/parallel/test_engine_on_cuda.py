"""The embedded engine on a GPU, rehearsed on paper: the tokens of the CPU in every layout, and a host that seldom waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.paper_cuda import install
from tests.parallel.test_engine import PROMPTS, SAMPLINGS, assert_close, generate_on_rank, tokens_of
from tests.ranks import RankPool
from tests.training import FAST
from tests.zoo import Zoo

LIMITS = (33, 97)


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    """Two ranks with a paper GPU each."""
    pool = RankPool(2, prepare=install, backend="cpu:gloo,cuda:nccl")
    yield pool
    pool.close()


def generate_deterministically(overrides: list[str]) -> dict[str, Any]:
    import torch

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform(deterministic=True)
    try:
        return generate_on_rank(overrides, PROMPTS, SAMPLINGS)
    finally:
        torch.use_deterministic_algorithms(False)


def syncs_on_rank(overrides: list[str]) -> list[dict[str, int]]:
    """Where the host waits in a generation of each of the limits, which some responses reach."""
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.job import build_job
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.types import Prompt
    from tests.paper_cuda.syncs import syncs

    job = build_job(load_config(overrides))
    assert job.engine is not None
    prompts = [Prompt(f"p{i}", "", np.array(ids, dtype=np.int64), "") for i, ids in enumerate(PROMPTS)]
    counted = []
    for limit in LIMITS:
        syncs.clear()
        rollouts = job.engine.generate(prompts, Sampling(1.0, 1.0, limit, copies=30, key=(1,)))
        assert "length" in {rollout.finish_reason for rollout in rollouts}
        counted.append(dict(syncs))
    return counted


def overrides_of(zoo: Zoo, layout: str) -> list[str]:
    path = f"rollout.path={zoo.rollouts('one')}"
    return [f"student.path={zoo.model('untied')}", "rollout=replay", path, "objective=grpo", *FAST, *layout.split()]


@pytest.fixture(scope="module")
def on_cpu(zoo: Zoo, ranks1: RankPool) -> dict[str, Any]:
    return ranks1.run(generate_on_rank, overrides_of(zoo, ""), PROMPTS, SAMPLINGS)[0]


@pytest.mark.parametrize("layout", ["parallel.tensor=2 parallel.sequence_parallel=true", "parallel.pipeline=2", ""])
def test_gpus_sample_the_tokens_of_the_cpu(layout: str, zoo: Zoo, gpus: RankPool, on_cpu: dict[str, Any]) -> None:
    """In deterministic mode, with attention over padded columns and a look at what has finished every 16 tokens only."""
    for result in gpus.run(generate_deterministically, overrides_of(zoo, layout)):
        assert tokens_of(result) == tokens_of(on_cpu)
        for sampling in SAMPLINGS:
            for row, expected in zip(result[sampling], on_cpu[sampling], strict=True):
                assert_close(row["sampler_log_probs"], expected["sampler_log_probs"])


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_the_host_waits_once_in_16_tokens(layout: str, zoo: Zoo, gpus: RankPool) -> None:
    for short, long in gpus.run(syncs_on_rank, overrides_of(zoo, layout)):
        more = {place: count - short.get(place, 0) for place, count in long.items() if count != short.get(place, 0)}
        assert sum(more.values()) == (LIMITS[1] - LIMITS[0]) // 16, more
        assert sum(short.values()) <= 12, short
