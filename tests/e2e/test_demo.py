"""The demo, run end to end through the real command line, with an untrained pair and a handful of problems."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest

from examples import comparison
from examples.tiny import demo, task
from examples.tiny.demo import training
from examples.tiny.make_pair import FLAW_RATE, write_random_model
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.rollout.files import read_scored

STEPS = 2
SHORT = ("rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "rollout.max_prompt_tokens=32")
"""An untrained student never ends a response by itself."""
FEW_PROBLEMS = {"eval": 6, "validation": 2, "train": 64, "sft": 2, "tuning": 1}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one that `make_pair` makes; its path is absolute, so it can be outside the project."""
    monkeypatch.setattr(task, "SPLITS", FEW_PROBLEMS)
    stages = tuple(tuple(replace(method, overrides=(*method.overrides, *SHORT)) for method in stage) for stage in demo.STAGES)
    monkeypatch.setattr(demo, "STAGES", stages)
    task.write_data(tmp_path / "data", FLAW_RATE)
    for name in ("student", "teacher"):
        write_random_model(tmp_path / name, name)
    return tmp_path


@pytest.mark.timeout(600)
def test_every_method_trains_from_the_same_start_is_reported_and_is_not_repeated(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    demo.demo(directory, STEPS, seeds=[3])

    runs = [training(method, 3, STEPS, directory) for stage in demo.STAGES for method in stage]
    metrics = {run.name.removesuffix("_seed3"): read_metrics(run.run_dir) for run in runs}
    assert [int(rows[-1]["step"]) for rows in metrics.values()] == [STEPS] * 3
    assert len({rows[0]["eval/accuracy"] for rows in metrics.values()}) == 1
    assert len({sum(row.get("samples", 0) for row in rows) for rows in metrics.values()}) == 1
    assert metrics["grpo"][-1]["teacher_tokens"] == 0 < metrics["kdrl"][-1]["teacher_tokens"]
    assert (metrics["kdrl"][-1]["alpha"], metrics["kd"][-1]["alpha"]) == (1.0, 0.0)
    assert metrics["kdrl"][1]["beta"] > metrics["kdrl"][2]["beta"]  # beta falls
    scored = {r.name.removesuffix("_seed3"): read_scored(r.run_dir / "rollouts" / "step_000001.jsonl") for r in runs}
    assert all("teacher_log_probs" in scores for _, scores in scored["kdrl"])  # for the report's log-ratios
    assert not any("teacher_log_probs" in scores for _, scores in scored["grpo"])
    by_prompt: dict[int, list[float]] = {}
    for rollout, _ in scored["grpo"]:
        by_prompt.setdefault(rollout.group_id, []).append(rollout.correct)
    means = [fmean(each) for each in by_prompt.values()]  # prompts are the independent draws, not their responses
    assert metrics["grpo"][1]["accuracy_stderr"] == pytest.approx(stdev(means) / len(means) ** 0.5)
    assert [row["step"] for row in metrics["grpo"] if row.get("time/evaluation", 0) > 0] == [0, STEPS]
    assert "tensor: 2" in (runs[0].run_dir / "config.yaml").read_text()
    assert all((run.run_dir / "hf" / "model.safetensors").is_file() for run in runs)
    assert (directory / "demo.png").stat().st_size > 10_000
    shown = capfd.readouterr()
    assert "took" in shown.out and all(f"{name}_seed3" in shown.out for name in metrics)

    monkeypatch.setattr(comparison, "start_training", lambda *_: pytest.fail("a complete run was started again"))
    demo.demo(directory, STEPS, seeds=[3])
    assert [run.is_complete() for run in runs] == [True] * 3
    assert not training(demo.KDRL, 3, STEPS + 1, directory).is_complete()
    (directory / "student").touch()  # a new student: runs trained from the old one no longer count
    assert not runs[0].is_complete()
