"""Gradients reduced during the backward pass and weights gathered during the next forward pass give the same updates, also from
the second step on (in the first, Megatron-Core only learns the order of the gradients)."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError
from tests.reference.tiny_models import (
    make_model,
    make_pair,
    make_qwen2,
    make_rollouts,
    read_hf_weights,
    read_jsonl,
    write_jsonl,
)
from tests.support.agreement import StudentLayout, check_adam, teacher_layout
from tests.support.late_weights import OVERLAPPED, train_with_late_weights_on_rank
from tests.support.ranks import RankPool
from tests.support.training import QUIET, metrics_of, train_on_rank
from tests.support.zoo import Zoo

REPLICATED = [
    StudentLayout(1, 1, 1, 2),
    StudentLayout(1, 1, 2, 1),
    StudentLayout(2, 1, 1, 2, sequence_parallel=True),
    StudentLayout(2, 1, 2, 1),
    StudentLayout(1, 2, 1, 2),
    StudentLayout(1, 2, 2, 1, virtual_pipeline=2),
]
"""Layouts with several replicas; in other layouts reduction and gathering involve one rank."""


@pytest.mark.parametrize("layout", REPLICATED, ids=str)
def test_two_steps_of_adam_are_those_of_torch(
    layout: StudentLayout, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    overrides = f"{layout.overrides} {teacher_layout(layout)} batch.micro_tokens={60 // layout.data} {OVERLAPPED}"
    check_adam(layout.ranks, overrides, True, zoo, pools[layout.ranks], tmp_path)


def test_two_steps_of_adam_with_a_rank_without_tokens(zoo: Zoo, ranks4: RankPool, tmp_path: Path) -> None:
    check_adam(4, f"{OVERLAPPED} batch.micro_tokens=1", True, zoo, ranks4, tmp_path, "two")


PROMPTS = ["1+2=", "what is 3*4", "x", "solve (2-1)/7", "9", "a+b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("overlap"), PROMPTS)


def everything_on(folder: Path, run: Path) -> list[str]:
    """A run with everything that reads the student's weights: self-test, sampling, old-policy pass, the two gradients measured
    separately, evaluation, checkpoints, resuming, export."""
    return [
        f"run.dir={run}",
        "trainer.steps=2",
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'train.jsonl'}",
        "data.template=plain",
        "eval.every=1",
        "eval.at_start=true",
        "reward=exact_match",
        "reward.workers=1",
        "objective=kdrl",
        "objective.beta.init=0.3",
        "objective.kd.estimator=exact",
        "rollout.prompts_per_step=2",
        "rollout.responses_per_prompt=3",
        "rollout.max_response_tokens=8",
        "batch.updates_per_step=2",
        "batch.micro_tokens=20",
        "optimizer.lr=0.01",
        "optimizer.adam_eps=1e-3",
        "logging.gradient_split_every=2",  # updates
        "checkpoint.every=1",
        "trainer.deterministic=true",
        *QUIET[:2],
    ]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, "parallel.pipeline=2"), (4, "parallel.pipeline=2 parallel.virtual_pipeline=2")],
    ids=["dp2 pp2", "dp2 pp2 interleaved"],
)
def test_whatever_reads_weights_waits_for_them(
    ranks: int, layout: str, folder: Path, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    plain, late = tmp_path / "plain", tmp_path / "late"
    outcomes = pools[ranks].run(train_on_rank, [*everything_on(folder, plain), *layout.split()])
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
    overrides = [*everything_on(folder, late), *layout.split(), *OVERLAPPED.split()]
    for steps in (1, 2):  # the second run resumes from the first one's checkpoint
        outcomes = pools[ranks].run(train_with_late_weights_on_rank, [*overrides, f"trainer.steps={steps}"])
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
        for outcome in outcomes:
            assert outcome.found["gathered"] > 0
            assert outcome.found["waiting"] == 0
    assert_same_runs(plain, late, 2)


def assert_same_runs(plain: Path, other: Path, steps: int) -> None:
    for step in range(1, steps + 1):
        rows = [read_jsonl(run / "rollouts" / f"step_{step:06d}.jsonl") for run in (plain, other)]
        assert [row["response_token_ids"] for row in rows[0]] == [row["response_token_ids"] for row in rows[1]]
    for row, expected in zip(metrics_of(other), metrics_of(plain), strict=True):
        assert row["step"] == expected["step"]
        for name, value in expected.items():
            if isinstance(value, float) and not name.startswith("time/"):
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    weights, expected_weights = (read_hf_weights(run / "hf") for run in (other, plain))
    assert all(
        (weights[name] - expected_weights[name]).norm() < 1e-4 * expected_weights[name].norm() for name in expected_weights
    )


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "parallel.expert=2"),
        (4, "parallel.expert=2 parallel.pipeline=2"),
        (4, "parallel.tensor=2 parallel.sequence_parallel=true parallel.expert=2"),
    ],
    ids=["dp2 ep2", "dp2 pp2 ep2", "dp2 tp2 sp ep2"],
)
def test_a_mixture_learns_the_same(ranks: int, layout: str, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """The experts have separate buckets, and some experts get no token in a micro-batch."""
    student = make_model("qwen3_moe", tmp_path / "student", seed=11, vocab_size=64)
    teacher = make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64)
    rollouts = write_jsonl(tmp_path / "rollouts.jsonl", make_rollouts(student, seed=13))
    for run, overlap in (("plain", ""), ("late", OVERLAPPED)):
        overrides = [
            f"run.dir={tmp_path / run}",
            f"student.path={student}",
            f"teacher.path={teacher}",
            "rollout=replay",
            f"rollout.path={rollouts}",
            "objective=kdrl",
            "objective.beta.init=0.1",
            "optimizer.lr=0.01",
            "optimizer.adam_eps=1e-3",
            "batch.micro_tokens=8",
            "trainer.steps=3",
            "trainer.self_test=false",
            *QUIET,
            *layout.split(),
            *overlap.split(),
        ]
        outcomes = pools[ranks].run(train_with_late_weights_on_rank if overlap else train_on_rank, overrides)
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
    assert_same_runs(tmp_path / "plain", tmp_path / "late", 3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather needs buckets"),
        (["parallel.bucket_size=1000"], "parallel.bucket_size needs buckets"),
        (["parallel.overlap_grad_reduce=true", "parallel.bucket_size=0"], "parallel.bucket_size=0 must be at least 1"),
        ([*OVERLAPPED.split(), "optimizer.name=sgd"], "optimizer.name=adam"),
        ([*OVERLAPPED.split(), "parallel.distributed_optimizer=false"], "parallel.distributed_optimizer=true"),
    ],
)
def test_settings_that_overlap_nothing_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["objective=grpo", *overrides])
    assert expected in str(error.value)
