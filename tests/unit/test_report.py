"""The report tells runs apart, gets the numbers right, and answers bad input with one line."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.metrics import MetricsLog, read_metrics
from tools.report import Entry, Run, by_seed, make_report, plot, run_names, summary

ROOT = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(run_dir: Path, steps: int = 10, teacher: bool = True, accuracy: float = 0.55) -> Path:
    with MetricsLog(run_dir, tensorboard=False) as log:
        log.write(0, {"eval/accuracy": 0.4, "eval/greedy_accuracy": 0.7})
        for step in range(1, steps + 1):
            metrics = {"reward": step / 10, "accuracy": step / 20, "response_length": 40.0, "entropy": 0.5, "samples": 128.0}
            metrics |= {"time/step": 0.5, "beta": 0.1 if teacher else 0.0, "teacher_tokens": 75.0 if teacher else 0.0}
            metrics |= {"teacher_tokens_saved": 25.0 if teacher else 100.0} | ({"kl": 0.02} if teacher else {})
            log.write(step, metrics)
        log.write(steps, {"eval/accuracy": accuracy, "eval/greedy_accuracy": 0.75})
    return run_dir


def entries(runs: list[Path]) -> list[Entry]:
    return by_seed([Run(run.name, read_metrics(run)) for run in runs])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "kdrl"), write_run(tmp_path / "grpo", teacher=False)]


def test_the_table_holds_the_runs_numbers(runs: list[Path]) -> None:
    header, kdrl, grpo = summary(entries(runs))
    assert dict(zip(header, kdrl, strict=True)) == {
        "run": "kdrl",
        "accuracy at start": "40.0%",
        "at end": "55.0%",
        "gain, points": "+15.0",
        "greedy at start": "70.0%",
        "greedy at end": "75.0%",
        "reward": "0.800",
        "KL": "0.0200",
        "length": "40.0",
        "samples": "1,280",
        "teacher tokens": "750",
        "saved": "25.0%",
        "s/step": "0.50",
    }
    assert dict(zip(header, grpo, strict=True)) | {"KL": "-", "saved": "-", "teacher tokens": "0", "run": "grpo"} == dict(
        zip(header, grpo, strict=True)
    )


def test_seeds_of_one_method_are_one_entry_with_mean_and_range(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"kdrl_seed{seed}", accuracy=accuracy) for seed, accuracy in ((1, 0.5), (2, 0.6))]
    header, kdrl, alone = summary(entries([*runs, write_run(tmp_path / "grpo_seed1")]))
    cells = dict(zip(header, kdrl, strict=True))
    assert (cells["run"], alone[0]) == ("kdrl", "grpo_seed1")
    assert (cells["at end"], cells["gain, points"]) == ("55.0% (50.0% to 60.0%)", "+15.0 (+10.0 to +20.0)")
    assert (cells["accuracy at start"], cells["samples"]) == ("40.0%", "1,280")
    accuracy = plot(entries(runs)).axes[0]
    assert [line.get_ydata()[-1] for line in accuracy.lines if line.get_marker() == "o"] == [pytest.approx(0.55)]
    assert len(accuracy.collections) == 1  # the band between the seeds


def test_the_picture_draws_every_run_in_every_panel_that_has_it(runs: list[Path]) -> None:
    figure = plot(entries(runs))
    panels = {axis.get_title(loc="left"): {line.get_color() for line in axis.lines} for axis in figure.axes}
    assert len(panels) == 6
    assert [len(colours) for title, colours in panels.items() if "KL" in title] == [1]
    assert all(len(colours) == 2 for title, colours in panels.items() if "KL" not in title)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kdrl", "grpo"]


def test_a_metric_that_is_not_finite_leaves_a_gap_only(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step, loss in ((1, 1.0), (2, float("nan")), (3, 3.0)):
            log.write(step, {"reward": loss})
    run = Run("x", read_metrics(tmp_path))
    assert run.curve("reward") == ([1, 3], [1.0, 3.0]) and run.final("reward") == 2.0
    plot([Entry("x", [run])])


def test_html_is_self_contained_and_escapes_names(runs: list[Path], tmp_path: Path) -> None:
    odd = runs[0].rename(tmp_path / "a<b>&c")
    make_report([odd, runs[1]], tmp_path / "out" / "report.html", Console(file=io.StringIO()))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "a&lt;b&gt;&amp;c" in text and "<b>" not in text and "+15.0" in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert base64.b64decode(picture).startswith(PNG_SIGNATURE)


def test_command_line_prints_the_table_and_writes_the_picture(runs: list[Path], tmp_path: Path) -> None:
    done = report(*map(str, runs), "--output", str(tmp_path / "report.png"))
    assert done.returncode == 0 and "kdrl" in done.stdout and "\x1b" not in done.stdout
    assert (tmp_path / "report.png").read_bytes().startswith(PNG_SIGNATURE)


def test_a_missing_run_is_one_line_and_exit_1(runs: list[Path], tmp_path: Path) -> None:
    done = report(str(runs[0]), str(tmp_path / "nowhere"), "--output", str(tmp_path / "report.png"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr and not (tmp_path / "report.png").exists()


def test_a_run_without_metrics_and_an_odd_output_are_named(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    console = Console(file=io.StringIO())
    with pytest.raises(DataError, match="empty"):
        make_report([tmp_path / "empty"], tmp_path / "report.png", console)
    with pytest.raises(ConfigError, match=r"report\.pdf"):
        make_report(runs, tmp_path / "report.pdf", console)
    with pytest.raises(DataError, match="cannot be written"):
        make_report(runs, runs[0] / "metrics.jsonl" / "report.png", console)


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert run_names([Path("a/kdrl"), Path("b/kdrl"), Path("grpo/")]) == ["a/kdrl", "b/kdrl", "grpo"]


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/report.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
