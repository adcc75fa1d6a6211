"""Training runs on paper CUDA sample the same tokens as on the CPU, and their numbers agree to the digit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.tiny_models import read_hf_weights, read_jsonl
from tests.support.late_weights import OVERLAPPED
from tests.support.paper_runs import paper_overrides, train_in_shapes_of_a_gpu, train_on_paper
from tests.support.ranks import RankPool
from tests.support.training import metrics_of


@dataclass(frozen=True)
class Case:
    """A run: its number of ranks, its settings on both devices, and the further settings on GPUs."""

    ranks: int
    settings: str
    on_gpu: str = ""
    student: str = "student"


OFFLOADED = "optimizer.offload=true"
ACTIVATIONS = "parallel.offload_min_elements=1 parallel.offload_activations="
CASES = {
    "one rank, reference, deterministic": Case(
        1,
        "objective.reference_kl.coefficient=0.1 objective.kd.estimator=k2 batch.updates_per_step=2 trainer.deterministic=true",
        OFFLOADED,
    ),
    "tp2 sp, exact, recompute": Case(
        2,
        "parallel.tensor=2 parallel.sequence_parallel=true parallel.recompute=full objective.kd.estimator=exact "
        "logging.gradient_split_every=1 batch.micro_tokens=48",
    ),
    "dp2 ep2, k1 as advantage": Case(
        2, "parallel.expert=2 objective.kd.estimator=k1 objective.kd.placement=advantage", OFFLOADED, "mixture"
    ),
    "tp2 pp2 interleaved, unbiased top-k": Case(
        4,
        "parallel.tensor=2 parallel.pipeline=2 parallel.virtual_pipeline=2 teacher.parallel.pipeline=2 "
        "objective.kd.estimator=top_k_unbiased objective.kd.top_k=5 parallel.recompute=full",
    ),
    "cp2 dp2 overlapped, top-k": Case(
        4,
        f"parallel.context=2 teacher.parallel.tensor=2 objective.kd.estimator=top_k objective.kd.top_k=5 {OVERLAPPED}",
        OFFLOADED,
    ),
    "tp2 sp ep2 dp2, k3": Case(
        4,
        "parallel.tensor=2 parallel.sequence_parallel=true parallel.expert=2 objective.kd.estimator=k3 batch.micro_tokens=48",
        student="mixture",
    ),
    "tp2 sp, activations off-loaded": Case(
        2,
        "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=48",
        f"{ACTIVATIONS}[qkv_linear,core_attn,attn_proj,mlp]",
    ),
    "pp2 interleaved, activations off-loaded": Case(
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=2 batch.updates_per_step=2",
        f"{ACTIVATIONS}[qkv_linear,core_attn,attn_proj,mlp]",
    ),
    "cp2, attention off-loaded, mlp recomputed": Case(
        2, "parallel.context=2 parallel.recompute=selective", f"{ACTIVATIONS}[qkv_linear,core_attn,attn_proj]"
    ),
    "dp2 ep2, experts off-loaded, attention recomputed": Case(
        2,
        "parallel.expert=2 parallel.recompute=selective parallel.recompute_modules=[core_attn]",
        f"{ACTIVATIONS}[qkv_linear,moe]",
        "mixture",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_run_gives_the_numbers_of_the_cpu(
    case: Case, pair: Path, pools: dict[int, RankPool], papers: dict[int, RankPool], tmp_path: Path
) -> None:
    settings = case.settings.split()
    on_cpu = pools[case.ranks].run(
        train_in_shapes_of_a_gpu, [*paper_overrides(pair, tmp_path / "cpu", case.student), *settings]
    )
    assert [outcome.code for outcome in on_cpu] == [0] * case.ranks, on_cpu
    on_gpu = papers[case.ranks].run(
        train_on_paper, [*paper_overrides(pair, tmp_path / "gpu", case.student), *settings, *case.on_gpu.split()]
    )
    assert [outcome.code for outcome in on_gpu] == [0] * case.ranks, on_gpu
    assert_same(tmp_path / "cpu", tmp_path / "gpu")


def assert_same(one: Path, other: Path) -> None:
    """Tokens, log-probs, metrics and final weights are the same."""
    for step in (1, 2):
        rows: list[list[dict[str, Any]]] = [read_jsonl(run / "rollouts" / f"step_{step:06d}.jsonl") for run in (one, other)]
        for expected, row in zip(*rows, strict=True):
            assert row["response_token_ids"] == expected["response_token_ids"]
            assert row["sampler_log_probs"] == expected["sampler_log_probs"]
    for row, expected in zip(metrics_of(other), metrics_of(one), strict=True):
        measured, wanted = (
            {k: float(v) for k, v in each.items() if not k.startswith(("time/", "memory/"))} for each in (row, expected)
        )
        assert measured == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)
    weights, wanted_weights = (read_hf_weights(run / "hf") for run in (other, one))
    assert [name for name, weight in wanted_weights.items() if not torch.equal(weights[name], weight)] == []
