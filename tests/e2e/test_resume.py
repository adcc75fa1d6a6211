"""A stopped run resumes bit for bit in its own layout, and with the same next step in another one; its export is what it
trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reference import dense
from tests.reference.tiny_models import make_pair, read_hf_weights, read_jsonl, write_jsonl
from tests.support.ranks import RankPool
from tests.support.training import PROMPTS, steps_of, train_on_rank
from tests.support.zoo import Zoo

TP2, PP2, DP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("resume"), PROMPTS)


def train(pool: RankPool, folder: Path, run: Path, steps: int, *overrides: str) -> None:
    """The run samples, verifies, distils with an annealed coefficient, and saves at the end."""
    outcomes = pool.run(
        train_on_rank,
        [
            f"run.dir={run}",
            f"trainer.steps={steps}",
            f"student.path={folder / 'student'}",
            f"teacher.path={folder / 'teacher'}",
            f"data.train={folder / 'train.jsonl'}",
            "data.template=plain",
            "reward=exact_match",
            "reward.workers=1",
            "objective=kdrl_annealing",
            "objective.beta.init=0.5",
            "objective.beta.delta=0.1",
            "rollout.prompts_per_step=3",
            "rollout.responses_per_prompt=2",
            "rollout.max_response_tokens=10",
            "optimizer.lr=0.01",
            "optimizer.adam_eps=1e-3",
            "logging.progress=false",
            "logging.tensorboard=false",
            "trainer.deterministic=true",
            *overrides,
        ],
    )
    assert [outcome.code for outcome in outcomes] == [0] * pool.world_size, outcomes[0].stderr


@pytest.fixture(scope="module")
def whole(folder: Path, ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on one rank that was never stopped."""
    run = tmp_path_factory.mktemp("whole")
    train(ranks1, folder, run, 4)
    return run


def sampled(run: Path, step: int) -> list[list[int]]:
    return [row["response_token_ids"] for row in read_jsonl(run / "rollouts" / f"step_{step:06d}.jsonl")]


@pytest.mark.parametrize("layout", [PP2, DP2], ids=["pp2", "dp2"])  # tp2: tests/faults/test_resume_runs.py
def test_two_and_two_steps_are_four_bit_for_bit(layout: str, folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    train(ranks2, folder, tmp_path / "whole", 4, layout)
    train(ranks2, folder, tmp_path / "parts", 2, layout)
    train(ranks2, folder, tmp_path / "parts", 4, layout)
    assert [row["step"] for row in steps_of(tmp_path / "parts")] == [1, 2, 3, 4]
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    assert [sampled(tmp_path / "parts", step) for step in (1, 4)] == [sampled(tmp_path / "whole", step) for step in (1, 4)]
    whole, parts = (read_hf_weights(tmp_path / name / "hf") for name in ("whole", "parts"))
    start = read_hf_weights(folder / "student")
    assert all(torch.equal(whole[name], parts[name]) and not torch.equal(whole[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, TP2), (2, PP2)),
        ((2, PP2), (2, DP2)),
        ((2, DP2), (2, TP2)),
        ((4, f"{TP2} {PP2}"), (1, DP2)),
        ((1, DP2), (4, f"{TP2} parallel.sequence_parallel=true")),
    ],
    ids=["tp2 to pp2", "pp2 to dp2", "dp2 to tp2", "tp2 pp2 to one rank", "one rank to tp2 dp2 sp"],
)
def test_a_run_goes_on_in_another_layout(
    before: tuple[int, str],
    after: tuple[int, str],
    folder: Path,
    whole: Path,
    pools: dict[int, RankPool],
    tmp_path: Path,
) -> None:
    """Steps 3 and 4 sample the same tokens and have the same losses as in a run that was never stopped: weights, Adam's
    moments, the schedule and the prompts have all been restored."""
    moved = tmp_path / "moved"
    train(pools[before[0]], folder, moved, 2, *before[1].split())
    train(pools[after[0]], folder, moved, 4, *after[1].split())
    for step in range(1, 5):
        assert sampled(moved, step) == sampled(whole, step)
    for row, other in zip(steps_of(moved), steps_of(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    weights, others = (read_hf_weights(run / "hf") for run in (moved, whole))
    assert all((weights[name] - others[name]).norm() < 1e-4 * others[name].norm() for name in others)


def test_transformers_scores_the_export_as_the_trainer_sampled(folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    """Step 3 samples with the weights of step 2, which the run exported: transformers gives those tokens the sampler's
    log-probs."""
    train(ranks2, folder, tmp_path, 2, TP2)
    exported = dense.load_model(tmp_path / "hf", torch.float32)
    train(ranks2, folder, tmp_path, 3, TP2)
    rows = read_jsonl(tmp_path / "rollouts" / "step_000003.jsonl")
    assert rows[0]["weight_version"] == 2
    for row in rows:
        with torch.no_grad():
            log_probs = dense.log_prob_of(dense.response_logits(exported, row, 61, 1.0).log_softmax(-1), row)
        assert log_probs.tolist() == pytest.approx(row["sampler_log_probs"], abs=2e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("layout", [TP2, PP2, DP2], ids=["tp2", "pp2", "dp2"])
def test_on_policy_gradients_are_the_dense_ones_of_what_was_sampled(
    estimator: str, layout: str, folder: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """The tokens are the student's own: importance weights are 1, and k3 has the paper's gradient."""
    lr = 1.0
    train(
        ranks2,
        folder,
        tmp_path,
        1,
        layout,
        f"objective.kd.estimator={estimator}",
        "optimizer.name=sgd",
        f"optimizer.lr={lr}",
        "optimizer.clip_grad=0",
        "checkpoint.every=-1",
    )
    rows = read_jsonl(tmp_path / "rollouts" / "step_000001.jsonl")
    settings = dense.Settings(beta=0.5, estimator=estimator, on_policy=True, vocab_size=61)
    expected = dense.kdrl(folder / "student", folder / "teacher", rows, settings)
    assert steps_of(tmp_path)[0]["loss"] == pytest.approx(expected.loss, rel=1e-4)
    before, after = read_hf_weights(folder / "student"), read_hf_weights(tmp_path / "hf")
    for name, gradient in expected.gradients.items():
        found = (before[name].double() - after[name].double()) / lr
        assert float((found - gradient).norm()) <= 1e-4 * max(float(gradient.norm()), 1e-3 * expected.grad_norm), name


def test_an_alert_counts_the_steps_before_a_stop_and_is_told_once(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    """The replayed sampler is two nats off. The tenth step reports this, wherever the run was stopped before or after."""
    rows = read_jsonl(zoo.rollouts("uneven"))
    for row in rows:
        row["sampler_log_probs"] = [log_prob - 2 for log_prob in row["sampler_log_probs"]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    overrides = ["objective=grpo", "rollout=replay", f"rollout.path={tmp_path}/rows.jsonl", "optimizer.lr=1e-4"]
    overrides += [
        "trainer.self_test=false",
        "logging.progress=false",
        "logging.tensorboard=false",
        "checkpoint.export_hf=false",
    ]
    told = []
    for steps in (7, 11, 13):
        job = [*overrides, f"student.path={zoo.model('untied')}", f"run.dir={tmp_path}/run", f"trainer.steps={steps}"]
        (outcome,) = ranks1.run(train_on_rank, job)
        assert outcome.code == 0, outcome.stderr
        told += [line.split(": sampler")[0] for line in outcome.stdout.splitlines() if "sampler_drift" in line]
    assert told == ["step 10"]
