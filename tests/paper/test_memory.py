"""GPU memory on paper CUDA: what is off-loaded is gone, a colocated engine finds nothing but what training keeps, and the
bytes that the planner expects to stay are those that do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.paper.runs import train_on_paper
from tests.paper.test_runs import overrides, pair  # noqa: F401
from tests.ranks import RankPool
from tools.bench_memory import configure, measure_on_rank, plan, write_model

SMALL = 64 * 1024
"""Bytes of what else a run may keep: the engine's stop tokens, a counter of Megatron-Core's, numbers of a loss."""
TOKENS, MICRO_BATCHES = 512, 2


def run(paper: RankPool, folder: Path, directory: Path, *more: str) -> list[tuple[str, int, dict[str, int]]]:
    """The phases of a run of two steps: name, bytes alive, bytes of what is kept."""
    (outcome,) = paper.run(train_on_paper, [*overrides(folder, directory), *more])
    assert outcome.code == 0, outcome
    phases: list[Any] = outcome.found["phases"]
    return phases


def test_an_engine_finds_weights_gradients_and_optimizer_and_nothing_else(
    pair: Path,  # noqa: F811
    paper1: RankPool,
    tmp_path: Path,
) -> None:
    phases = run(paper1, pair, tmp_path, "objective.kd.estimator=k2")
    awake = [(live, kept) for name, live, kept in phases if name in ("refit", "rollout")]
    assert len(awake) == 4
    for live, kept in awake:
        assert kept["teacher"] == 0
        assert 0 <= live - sum(kept.values()) < SMALL
    assert awake[-1][1]["optimizer"] > 0


def test_an_off_loaded_optimizer_is_gone(pair: Path, paper1: RankPool, tmp_path: Path) -> None:  # noqa: F811
    phases = run(paper1, pair, tmp_path, "optimizer.offload=true", "teacher.offload=false", "eval.every=-1")
    assert {"checkpoint", "export"} <= {name for name, _, _ in phases}
    assert all(kept["optimizer"] == 0 and kept["teacher"] > 0 for _, _, kept in phases)
    for name, live, kept in phases:
        if name in ("refit", "rollout", "teacher", "train"):
            assert live - sum(kept.values()) < SMALL


@pytest.mark.parametrize("layout", ["data", "tensor, sequence, bfloat16"])
def test_planned_memory_is_what_the_ledger_holds(layout: str, paper2: RankPool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", hidden=256, layers=4, vocab=4096)
    settings, config = configure(layout, model, TOKENS)
    config.cluster.memory_gib = 80
    planned = plan(config, TOKENS, MICRO_BATCHES)
    for measured in paper2.run(measure_on_rank, settings, TOKENS, MICRO_BATCHES, timeout=300):
        rank = planned[measured.stage]
        assert rank.between_steps == pytest.approx(measured.held.between, rel=0.02)
        assert rank.peak == pytest.approx(measured.held.peak, rel=0.10)
