"""GPU memory on paper CUDA: what is off-loaded is freed, a colocated engine finds only what training keeps, and the bytes that
stay are those that the planner expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.memory import Measured, configure, measure_on_rank, plan, write_model
from kdrl_mcore.config import load_config
from tests.support.paper_runs import paper_overrides, train_beside_an_engine, train_on_paper
from tests.support.ranks import RankPool
from tests.support.receiver import Process

SMALL = 64 * 1024
"""Bytes that a run may keep otherwise: the engine's stop tokens, a counter of Megatron-Core, the numbers of a loss."""
TOKENS, MICRO_BATCHES = 256, 2


def measure_held(settings: list[str]) -> Measured:
    """`measure_on_rank` by what the allocator holds, which on paper CUDA is what is allocated."""
    return measure_on_rank(settings, TOKENS, MICRO_BATCHES, follow=False)


def run(paper: RankPool, folder: Path, directory: Path, *more: str) -> list[tuple[str, int, dict[str, int]]]:
    """The phases of a run of two steps: name, allocated bytes, bytes of what is kept."""
    (outcome,) = paper.run(train_on_paper, [*paper_overrides(folder, directory), *more])
    assert outcome.code == 0, outcome
    phases: list[Any] = outcome.found["phases"]
    return phases


def test_an_engine_finds_weights_gradients_and_optimizer_and_nothing_else(
    pair: Path,
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


def test_an_off_loaded_optimizer_is_gone(pair: Path, paper1: RankPool, tmp_path: Path) -> None:
    phases = run(paper1, pair, tmp_path, "optimizer.offload=true", "teacher.offload=false", "eval.every=-1")
    assert {"checkpoint", "export"} <= {name for name, _, _ in phases}
    assert all(kept["optimizer"] == 0 and kept["teacher"] > 0 for _, _, kept in phases)
    for name, live, kept in phases:
        if name in ("refit", "rollout", "teacher", "train"):
            assert live - sum(kept.values()) < SMALL


@pytest.mark.parametrize("offload", [True, False])
def test_earlier_weights_are_on_the_host_or_take_four_bytes_each(
    offload: bool, pair: Path, paper1: RankPool, tmp_path: Path
) -> None:
    own = ["teacher.path=null", "teacher.weights=average", "objective.kd.estimator=k2", "optimizer.offload=true"]
    phases = run(paper1, pair, tmp_path, *own, f"teacher.offload={str(offload).lower()}")
    assert {name for name, *_ in phases} >= {"rollout", "teacher", "train"}
    for name, live, kept in phases:
        assert kept["teacher"] == 0
        if name in ("refit", "rollout"):
            earlier = 0 if offload else kept["gradients"]  # also float32
            assert abs(live - sum(kept.values()) - earlier) < SMALL


def test_an_engine_in_a_process_of_its_own_wakes_beside_what_training_keeps(
    pair: Path,
    paper1: RankPool,
    tmp_path: Path,
) -> None:
    """A colocated engine gets its weights through CUDA IPC, and none of that memory remains when its KV cache is allocated."""
    receiver = Process(1, "cuda")
    settings = ["rollout=vllm", "rollout.vllm.gpu_memory_utilization=0.5", "objective.kd.estimator=k2", "eval.every=-1"]
    try:
        arguments = [*paper_overrides(pair, tmp_path), *settings, "rollout.max_log_prob_drift=100", "trainer.self_test=false"]
        (outcome,) = paper1.run(train_beside_an_engine, arguments, receiver.port, timeout=280)
    finally:
        receiver.close()
    assert outcome.code == 0, outcome
    awake = outcome.found["awake"]
    each_step = ["wake weights", "wake kv_cache", "generate", "sleep"]
    assert {moment for moment, *_ in awake} == set(each_step)
    for _, live, kept in awake:
        assert kept["weights"] > 0 and kept["gradients"] > 0 and kept["teacher"] == 0
        assert 0 <= live - sum(kept.values()) < SMALL
    assert awake[-1][2]["optimizer"] > 0


@pytest.mark.parametrize("layout", ["tensor, sequence, bfloat16", "adapters, tensor, sequence, recompute, bfloat16"])
def test_planned_memory_is_what_the_ledger_holds(layout: str, paper2: RankPool, tmp_path: Path) -> None:
    """Two layouts; `tests/parallel/test_planned_memory.py` has the others, on the CPU."""
    model = write_model(tmp_path / "model", hidden=256, layers=4, vocab=2048)
    settings, config = configure(layout, model, TOKENS)
    config.cluster.memory_gib = 80
    planned = plan(config, TOKENS, MICRO_BATCHES)
    for measured in paper2.run(measure_held, settings, timeout=300):
        rank = planned[measured.stage]
        assert rank.between_steps == pytest.approx(measured.held.between, rel=0.02)
        assert rank.peak == pytest.approx(measured.held.peak, rel=0.10)


def test_off_loaded_activations_are_gone_as_planned(paper1: RankPool, tmp_path: Path) -> None:
    """Most of the activations that the attention of eight layers keeps are on the host when the backward pass begins, and come
    back in time."""
    model = write_model(tmp_path / "model", hidden=256, layers=8, vocab=512)
    peaks = []
    for offloaded in ("[]", "[qkv_linear,core_attn,attn_proj]"):
        settings = [
            "objective=sft",
            f"student.path={model}",
            f"batch.micro_tokens={TOKENS}",
            "parallel.recompute=selective",
            f"parallel.offload_activations={offloaded}",
            f"parallel.offload_min_elements={32 * TOKENS}",
        ]
        config = load_config(settings)
        config.cluster.memory_gib = 80
        (planned,) = plan(config, TOKENS, MICRO_BATCHES, ranks=1)
        (measured,) = paper1.run(measure_held, settings, timeout=300)
        assert planned.peak == pytest.approx(measured.held.peak, rel=0.10)
        peaks.append((planned.peak, measured.held.peak))
    saved, really_saved = (before - after for before, after in zip(*peaks, strict=True))
    assert saved > 0.05 * peaks[0][0] and really_saved == pytest.approx(saved, rel=0.15)


def build_on_rank(overrides: list[str], plan: float | str) -> tuple[list[Any], Any]:
    """Build a job whose plan leaves a share of a GPU to an engine, or reports that it leaves none. Returns what is planned on
    this rank and the share with which engines would be started, or the error."""
    from kdrl_mcore.config import load_config
    from kdrl_mcore.errors import ConfigError
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore import build

    planned: list[Any] = []

    def plan_share(config: Any, world_size: int, memory_gib: float) -> float:
        planned.append((world_size, memory_gib))
        if isinstance(plan, str):
            raise ConfigError(plan)
        return plan

    def start(config: Any, vocab_size: int, share: float | None = None, *_: Any) -> Any:
        raise ConfigError(f"share {share}")

    with patch.object(build, "plan_engine_share", plan_share), patch.object(build, "start_replicas", start):
        try:
            build.build_job(load_config(overrides))
        except ConfigError as error:
            return planned, str(error)
    return planned, None


@pytest.mark.parametrize(
    ("plan", "placement", "told"),
    [(0.37, "colocated", "share 0.37"), ("no room", "colocated", "no room"), (1.0, "server", "share None")],
)
def test_a_colocated_engine_gets_the_share_that_the_plan_leaves(
    plan: float | str,
    placement: str,
    told: str,
    pair: Path,
    paper2: RankPool,
    tmp_path: Path,
) -> None:
    """Rank 0 plans for the smallest GPU, and every rank has the result."""
    vllm = [
        "rollout=vllm",
        f"rollout.vllm.placement={placement}",
        "parallel.tensor=2",
        "teacher.parallel.tensor=2",
        "eval.every=-1",
    ]
    found = paper2.run(build_on_rank, [*paper_overrides(pair, tmp_path), *vllm], plan)
    assert [error for _, error in found] == [told, told]
    assert [planned for planned, _ in found] == [[(2, 80.0)] if placement == "colocated" else [], []]
