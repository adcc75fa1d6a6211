"""The embedded engine on a GPU, rehearsed on paper CUDA: it samples the CPU's tokens in every layout, and the host seldom
waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from torch.nn import functional as F

from tests.paper_cuda import choose_gpu, import_training
from tests.support.ranks import RankPool
from tests.support.sampling import PROMPTS, SAMPLINGS, assert_close, generate_on_rank, tokens_of
from tests.support.training import FAST
from tests.support.zoo import Zoo

LIMITS = (33, 97)
# The bound of a truncated distribution takes many small operations, each of which is slow on paper.
FEW = {"max_response_tokens": 3, "responses_per_prompt": 2}
MEASURED = {name: how | FEW if name in ("nucleus", "head") else how for name, how in SAMPLINGS.items()}


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    """Two ranks with a paper GPU each."""
    pool = RankPool(2, preload=import_training, prepare=choose_gpu, backend="cpu:gloo,cuda:nccl")
    yield pool
    pool.close()


def generate_deterministically(overrides: list[str]) -> dict[str, Any]:
    import torch

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform(deterministic=True)
    try:
        return generate_on_rank(overrides, PROMPTS, MEASURED)
    finally:
        torch.use_deterministic_algorithms(False)


def syncs_on_rank(overrides: list[str]) -> tuple[list[dict[str, int]], set[int]]:
    """Where the host waits in a generation with each of the limits, which some responses reach; and the numbers of keys that
    attention covers while decoding."""
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.build import build_job
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.types import Prompt
    from tests.paper_cuda.syncs import syncs

    columns, attend = set(), F.scaled_dot_product_attention

    def attend_and_note(query: Any, key: Any, value: Any, attn_mask: Any = None, **settings: Any) -> Any:
        if attn_mask is not None:  # a prompt has none
            columns.add(key.size(2))
        return attend(query, key, value, attn_mask=attn_mask, **settings)

    job = build_job(load_config(overrides))
    assert job.engine is not None
    prompts = [Prompt(f"p{i}", "", np.array(ids, dtype=np.int64), "") for i, ids in enumerate(PROMPTS)]
    counted = []
    for limit in LIMITS:
        syncs.clear()
        with patch.object(F, "scaled_dot_product_attention", attend_and_note):
            rollouts = job.engine.generate(prompts, Sampling(1.0, 1.0, limit, responses_per_prompt=30, key=(1,)))
        assert "length" in {rollout.finish_reason for rollout in rollouts}
        counted.append(dict(syncs))
    return counted, columns


def overrides_of(zoo: Zoo, layout: str) -> list[str]:
    path = f"rollout.path={zoo.rollouts('one')}"
    return [f"student.path={zoo.model('untied')}", "rollout=replay", path, "objective=grpo", *FAST, *layout.split()]


@pytest.fixture(scope="module")
def on_cpu(zoo: Zoo, ranks1: RankPool) -> dict[str, Any]:
    return ranks1.run(generate_on_rank, overrides_of(zoo, ""), PROMPTS, MEASURED)[0]


@pytest.mark.parametrize("layout", ["parallel.tensor=2 parallel.sequence_parallel=true", "parallel.pipeline=2", ""])
def test_gpus_sample_the_tokens_of_the_cpu(layout: str, zoo: Zoo, gpus: RankPool, on_cpu: dict[str, Any]) -> None:
    """In deterministic mode, with attention over padded columns and a check for finished responses only every 16 tokens."""
    for result in gpus.run(generate_deterministically, overrides_of(zoo, layout)):
        assert tokens_of(result) == tokens_of(on_cpu)
        for sampling in MEASURED:
            for row, expected in zip(result[sampling], on_cpu[sampling], strict=True):
                assert_close(row["sampler_log_probs"], expected["sampler_log_probs"])


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_the_host_waits_once_in_16_tokens_and_attention_meets_few_shapes(layout: str, zoo: Zoo, gpus: RankPool) -> None:
    for (short, long), columns in gpus.run(syncs_on_rank, overrides_of(zoo, layout)):
        assert columns == {64, 128}
        more = {line: count - short.get(line, 0) for line, count in long.items() if count != short.get(line, 0)}
        assert sum(more.values()) == (LIMITS[1] - LIMITS[0]) // 16, more
        assert sum(short.values()) <= 12, short


def has_cudnn_attention() -> bool:
    import torch

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    return torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_is_never_cudnns(gpus: RankPool) -> None:
    """It makes a new plan for every length and keeps each plan."""
    assert gpus.run(has_cudnn_attention) == [False, False]
