"""Transformer Engine's layers (played by `tests/stubs`) on paper CUDA, where the program itself finds that they serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paper_cuda import install
from tests.parallel.test_optimizer_agreement import overrides_of
from tests.ranks import RankPool
from tests.te_ranks import STUBS, updates_on_rank
from tests.training import metrics_of, train_on_rank
from tests.zoo import Zoo

LAYOUT = "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=40"


@pytest.fixture(scope="module")
def te_gpus() -> Iterator[RankPool]:
    pool = RankPool(2, import_first=[STUBS], prepare=install, backend="cpu:gloo,cuda:nccl")
    yield pool
    pool.close()


def test_the_loss_in_bfloat16_is_that_of_the_local_layers_on_the_cpu(
    zoo: Zoo, te_gpus: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, pool, on_rank in (("gpu", te_gpus, updates_on_rank), ("cpu", ranks2, train_on_rank)):
        run = tmp_path / name
        settings = [*overrides_of(zoo, run, "untied"), *LAYOUT.split(), "model.dtype=bfloat16", "optimizer.lr=0.01"]
        outcomes = pool.run(on_rank, [*settings, "trainer.steps=2"], timeout=250)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        found[name] = metrics_of(run)
        if name == "gpu":
            assert outcomes[0].found["decoder.layers.0.mlp.linear_fc1.weight"]  # the layers were Transformer Engine's
    assert [step["loss"] for step in found["gpu"]] == [pytest.approx(step["loss"], rel=2e-2) for step in found["cpu"]]
