"""Runs on paper CUDA that replay the same tokens as on the CPU agree to the digit with the output head in torch, and up to
bfloat16's rounding with Triton's head. `test_runs.py` has the runs that sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.tiny_models import read_hf_weights
from tests.support.agreement import JOINT, Case, check
from tests.support.paper_runs import train_on_paper
from tests.support.ranks import RankPool
from tests.support.training import QUIET, Outcome, metrics_of, train_on_rank
from tests.support.zoo import Zoo

BFLOAT16 = 1e-2
SYNCS_OF_AN_UPDATE = 12
"""Norms, whether they are finite, metrics, and the clock."""
SYNCS_OF_A_TEACHER_PASS = 1
"""For copying its log-probs to the host."""
SAVE = "checkpoint.every=0"
"""A checkpoint at the last step."""


def overrides(zoo: Zoo, run: Path, settings: str) -> list[str]:
    """A run with self-test and export; `settings` may change its objective."""
    return [
        f"run.dir={run}",
        f"student.path={zoo.model('untied')}",
        f"teacher.path={zoo.model('teacher')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts('uneven')}",
        "objective=kdrl",
        "objective.beta.init=0.3",
        "batch.micro_tokens=48",
        "optimizer.lr=0.01",
        "optimizer.adam_eps=1e-3",
        *QUIET,
        *settings.split(),
    ]


def train(pool: RankPool, train_one: Any, settings: list[str], *more: Any) -> list[Outcome]:
    outcomes: list[Outcome] = pool.run(train_one, settings, *more)
    assert [outcome.code for outcome in outcomes] == [0] * pool.world_size, outcomes
    return outcomes


def numbers_of(run: Path) -> list[dict[str, float]]:
    """The metrics without their times."""
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in metrics_of(run)]


def assert_seldom_waits(outcome: Outcome) -> None:
    """In the last step the host waited for the GPU a few times for the update and never for a micro-batch.
    `tests/parallel/test_engine_on_cuda.py` counts the waits while decoding."""
    syncs = outcome.found["syncs"]
    assert outcome.found["passes"]["train"] == 5
    assert sum(syncs["train"].values()) <= SYNCS_OF_AN_UPDATE, syncs["train"]
    assert sum(syncs["teacher"].values()) <= 1 + 3 * SYNCS_OF_A_TEACHER_PASS, syncs["teacher"]
    for phase in ("refit", "rollout", "reward"):
        assert sum(syncs[phase].values()) <= 1, (phase, syncs[phase])  # for the clock


def assert_equal(run: Path, other: Path) -> None:
    """The metrics and the exported weights agree to the digit."""
    assert numbers_of(run) == numbers_of(other)
    weights, wanted = read_hf_weights(run / "hf"), read_hf_weights(other / "hf")
    assert weights.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []


def test_two_and_two_steps_are_the_cpus_four_to_the_digit(zoo: Zoo, ranks2: RankPool, paper2: RankPool, tmp_path: Path) -> None:
    settings = "parallel.tensor=2 parallel.sequence_parallel=true objective.kd.estimator=k2"
    cpu, gpu = (overrides(zoo, tmp_path / name, settings) for name in ("cpu", "gpu"))
    train(ranks2, train_on_rank, [*cpu, "trainer.steps=4"])
    train(paper2, train_on_paper, [*gpu, SAVE, "trainer.steps=2"])
    resumed = train(paper2, train_on_paper, [*gpu, SAVE, "trainer.steps=4"])
    assert any("resumed from" in line for line in resumed[0].log)
    for outcome in resumed:
        assert_seldom_waits(outcome)
    assert [row["step"] for row in numbers_of(tmp_path / "gpu")] == [1, 2, 3, 4]
    assert_equal(tmp_path / "gpu", tmp_path / "cpu")


def test_an_off_loaded_optimizer_is_saved_as_it_was_in_that_step(zoo: Zoo, paper2: RankPool, tmp_path: Path) -> None:
    """Each checkpoint is written during the steps after it, whose updates move the state to the GPU and back."""
    settings = "parallel.tensor=2 optimizer.offload=true checkpoint.every=1 checkpoint.keep=0 trainer.steps=4"
    train(paper2, train_on_paper, overrides(zoo, tmp_path / "straight", settings))
    for step in (1, 3):
        saved = f"checkpoint.resume={tmp_path}/straight/checkpoints/step_{step:06d}"
        run = tmp_path / f"from_{step}"
        train(paper2, train_on_paper, [*overrides(zoo, run, settings), saved])
        assert numbers_of(run) == numbers_of(tmp_path / "straight")[step:]
        weights, wanted = read_hf_weights(run / "hf"), read_hf_weights(tmp_path / "straight" / "hf")
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_supervised_fine_tuning_gives_the_digits_of_the_cpu(
    zoo: Zoo, ranks2: RankPool, paper2: RankPool, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i}+{i}=", "response": f"{2 * i} " * (i + 1), "answer": "-"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train={tmp_path / 'data.jsonl'} data.template=plain rollout.prompts_per_step=4"
    settings = f"objective=sft teacher.path=null parallel.pipeline=2 trainer.steps=2 {data}"
    train(ranks2, train_on_rank, overrides(zoo, tmp_path / "cpu", settings))
    train(paper2, train_on_paper, overrides(zoo, tmp_path / "gpu", settings))
    assert_equal(tmp_path / "gpu", tmp_path / "cpu")


def test_bfloat16_and_triton_give_the_numbers_of_the_cpu(zoo: Zoo, ranks2: RankPool, paper2: RankPool, tmp_path: Path) -> None:
    """The run on CUDA says once that its first passes compile; nothing compiles on the CPU."""
    settings = "model.dtype=bfloat16 parallel.tensor=2 objective.kd.estimator=exact trainer.steps=1"
    on_cpu = train(ranks2, train_on_rank, overrides(zoo, tmp_path / "cpu", settings))
    on_gpu = train(paper2, train_on_paper, overrides(zoo, tmp_path / "gpu", settings), True)
    said = [sum("the first passes compile" in line for line in outcome.log) for outcome in (*on_cpu, *on_gpu)]
    assert said == [0, 0, 1, 0]
    for row, expected in zip(numbers_of(tmp_path / "gpu"), numbers_of(tmp_path / "cpu"), strict=True):
        assert row == pytest.approx(expected, rel=BFLOAT16, abs=BFLOAT16, nan_ok=True)
    weights, wanted = (read_hf_weights(tmp_path / name / "hf") for name in ("gpu", "cpu"))
    for name, weight in wanted.items():
        assert (weights[name] - weight).norm() <= BFLOAT16 * weight.norm(), name


AXES: dict[str, tuple[str, dict[str, Any]]] = {
    "gate, entropy, sequence correction": (
        "parallel.tensor=2 parallel.sequence_parallel=true",
        {
            **{"combine": "gate", "token_weight": "entropy", "entropy_bonus": 0.05},
            **{"correction": "mask", "correction_level": "sequence", "correction_bound": 1.3},
        },
    ),
    "forward, mixed by trust, cispo": (
        "parallel.context=2",
        {"estimator": "exact", "divergence": "forward", "mix": "trust", "combine": "gate", "policy_loss": "cispo"},
    ),
    "top-k, mixed by entropy, prefix": (
        "parallel.pipeline=2",
        {
            **{"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_support": "teacher", "top_k_tail": "truncate"},
            **{"mix": "entropy", "mix_above": 3.9, "token_weight": "prefix", "stop_token": "mask"},
        },
    ),
}


@pytest.mark.parametrize("axes", AXES.values(), ids=list(AXES))
def test_other_forms_of_the_objective_are_those_of_the_dense_reference(
    axes: tuple[str, dict[str, Any]], zoo: Zoo, paper2: RankPool, tmp_path: Path
) -> None:
    layout, changes = axes
    check(Case(2, f"{layout} batch.micro_tokens=60", replace(JOINT, **changes)), zoo, paper2, tmp_path)
