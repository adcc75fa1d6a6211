"""The report tells configurations apart, gets numbers and intervals right, stays small, and answers bad input with one line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kdrl_mcore.config import load_config, save_config
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.monitoring.summary import Interval, t_interval
from kdrl_mcore.reporting.page import page_data, write_page
from kdrl_mcore.reporting.picture import intervals_picture, plot
from kdrl_mcore.reporting.rollouts import sample_rollouts
from kdrl_mcore.reporting.runs import Group, by_configuration, differences, read_runs, run_names
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.types import Rollout
from tools.report import make_report, watch

ROOT = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(
    run_dir: Path, *overrides: str, steps: int = 10, planned: int | None = None, teacher: bool = True, accuracy: float = 0.55
) -> Path:
    """A run of `steps` steps out of `planned`, with a configuration if there are overrides."""
    with MetricsLog(run_dir, tensorboard=False) as log:
        log.write(0, {"eval/accuracy": 0.4, "eval/greedy_accuracy": 0.7})
        for step in range(1, steps + 1):
            metrics = {"reward": step / 10, "accuracy": step / 20, "response_length": 40.0, "entropy": 0.5, "samples": 128.0}
            metrics |= {"time/step": 0.5, "time/train": 0.2, "beta": 0.1 if teacher else 0.0}
            metrics |= {"teacher_tokens": 75.0 if teacher else 0.0, "teacher_tokens_saved": 25.0 if teacher else 100.0}
            log.write(step, metrics | ({"kl": 0.02} if teacher else {}))
        log.write(steps, {"eval/accuracy": accuracy, "eval/greedy_accuracy": 0.75})
    if overrides:
        save_config(
            load_config([*overrides, f"run.dir={run_dir}", f"trainer.steps={planned or steps}"]), run_dir / "config.yaml"
        )
    return run_dir


def rollout(reward: float, teacher: bool = True, prompt_id: str = "p", group_id: int = 0, tokens: int = 3) -> Rollout:
    student = np.full(tokens, -1.0, dtype=np.float32)
    scores = np.linspace(-0.5, -2.0, tokens, dtype=np.float32) if teacher else None
    ids = np.arange(1, tokens + 1)
    return Rollout(
        *(prompt_id, group_id, ids, ids, student, "stop", 0, reward, reward > 0, "</script>1+1=", "2", "2"),
        teacher_log_probs=scores,
    )


def groups(*directories: Path) -> list[Group]:
    return by_configuration(read_runs(directories))


def cells(data: dict[str, Any], group: int) -> dict[str, str]:
    columns = data["table"]["columns"]
    return {column["key"]: column["cells"][group]["text"] for column in columns if column["cells"][group] is not None}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "kdrl"), write_run(tmp_path / "grpo", teacher=False)]


def test_t_intervals_are_those_of_the_textbook() -> None:
    assert t_interval([]) is None
    assert t_interval([3.0]) == Interval(3.0, None)
    interval = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval is not None and interval.mean == 3.0
    assert interval.half_width == pytest.approx(2.776 * np.sqrt(2.5 / 5))
    many = t_interval(np.random.default_rng(0).normal(size=200))
    assert many is not None and many.half_width == pytest.approx(1.96 / np.sqrt(200), rel=0.1)


def test_the_table_holds_the_runs_numbers(runs: list[Path]) -> None:
    data = page_data(groups(*runs))
    expected = {"accuracy": "55.0%", "accuracy_at_start": "40.0%", "greedy_accuracy": "75.0%", "reward": "0.800", "kl": "0.020"}
    expected |= {"entropy": "0.500", "samples": "1,280", "teacher_tokens": "750", "teacher_saved": "25.0%"}
    assert cells(data, 0) == expected | {"seconds_per_step": "0.50"}
    assert {key: value for key, value in cells(data, 1).items() if "teacher" in key or key == "kl"} == {"teacher_tokens": "0"}


def test_runs_that_differ_in_the_seed_only_are_one_entry_with_an_interval(tmp_path: Path) -> None:
    base = ("experiment=tiny_cpu", "objective=kdrl")
    directories = [
        write_run(tmp_path / "kdrl-seed1-0123abcd", *base, "trainer.seed=1", accuracy=0.5),
        write_run(tmp_path / "another name", *base, "trainer.seed=2", accuracy=0.6),
        write_run(tmp_path / "kdrl-seed1-4567abcd", *base, "trainer.seed=1", "objective.beta.init=0.5"),
    ]
    found = groups(*directories)
    assert [(group.name, len(group.runs)) for group in found] == [("kdrl-seed1-0123abcd", 2), ("kdrl-seed1-4567abcd", 1)]
    data = page_data(found)
    assert cells(data, 0)["accuracy"] == f"55.0% ± {12.706 * 0.05:.1%}" and cells(data, 0)["samples"] == "1,280"
    assert differences(found) == {"objective.beta.init": [0.002, 0.5]}
    assert [group.name for group in groups(*directories[:2])] == ["kdrl"]


def test_without_configurations_names_tell_the_seeds(tmp_path: Path) -> None:
    found = groups(*(write_run(tmp_path / name) for name in ("kdrl_seed1", "grpo", "kdrl_seed2")))
    assert [(group.name, len(group.runs)) for group in found] == [("kdrl", 2), ("grpo", 1)]
    assert run_names([Path("a/kdrl"), Path("b/kdrl"), Path("grpo/")]) == ["a/kdrl", "b/kdrl", "grpo"]


def test_tokens_carry_the_advantage_of_the_whole_group_and_the_log_ratio(tmp_path: Path) -> None:
    write_run(tmp_path)
    group = [rollout(1.0), rollout(0.0), rollout(0.0, teacher=False), *(rollout(0.0) for _ in range(5))]
    equal = [rollout(1.0, group_id=1, prompt_id="q") for _ in range(8)]
    write_rollouts(tmp_path / "rollouts" / "step_000004.jsonl", [*equal, *group])
    prompts = sample_rollouts(read_runs([tmp_path])[0], max_tokens=10_000)
    assert [len({answer["reward"] for answer in prompt["responses"]}) for prompt in prompts] == [
        2,
        1,
    ]  # mixed groups come first
    assert (prompts[0]["step"], prompts[0]["size"], prompts[0]["correct"], prompts[0]["beta"]) == (4, 8, 1, 0.1)
    best = prompts[0]["responses"][0]
    rewards = np.array([1.0] + [0.0] * 7)
    assert best["advantage"] == round((1 - rewards.mean()) / (rewards.std(ddof=1) + 1e-6), 3)
    assert best["log_ratio"] == [0.5, -0.25, -1.0] and best["tokens"] == ["[1]", "[2]", "[3]"]
    assert prompts[1]["responses"][0]["advantage"] == 0.0
    assert any(answer["log_ratio"] is None for answer in prompts[0]["responses"])


def test_big_runs_stay_small_and_a_file_in_the_making_is_left_out(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "long", steps=1500)
    for step in (1, 2, 3, 1500):
        write_rollouts(directory / "rollouts" / f"step_{step:06d}.jsonl", [rollout(i, tokens=4000) for i in range(8)])
    (directory / "rollouts" / "step_000003.jsonl").write_text('{"prompt_id": 1, "gr')
    data = page_data(groups(*[directory] * 3))
    assert len(write_page(groups(*[directory] * 3))) < 4_000_000
    prompts = data["rollouts"][0]["prompts"]
    assert prompts and {prompt["step"] for prompt in prompts} <= {1, 2, 1500}
    assert {len(answer["tokens"]) + answer["cut"] for prompt in prompts for answer in prompt["responses"]} == {4000}
    steps = data["groups"][0]["runs"][0]["curves"]["reward"][0]
    assert steps[-1] == 1500


def test_what_is_not_finite_leaves_a_gap_only(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step, loss in ((1, 1.0), (2, float("nan")), (3, float("inf")), (4, 3.0)):
            log.write(step, {"reward": loss})
    data = page_data(groups(tmp_path))
    assert data["groups"][0]["runs"][0]["curves"]["reward"] == [[1, 4], [1.0, 3.0]] and cells(data, 0) == {"reward": "2.000"}
    plot(groups(tmp_path))


def test_alerts_say_when_they_began(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "bad", tensorboard=False) as log:
        for step in range(1, 21):
            log.write(step, {"reward": 0.8 if step <= 10 else 0.01})
    (alert,) = page_data(groups(tmp_path / "bad"))["alerts"]
    assert (alert["run"], alert["name"]) == ("bad", "reward_collapse") and 11 <= alert["step"] <= 16


def test_the_page_is_self_contained_and_nothing_in_the_data_ends_its_script(runs: list[Path], tmp_path: Path) -> None:
    odd = runs[0].rename(tmp_path / "a<b>&c")
    write_rollouts(odd / "rollouts" / "step_000001.jsonl", [rollout(1.0), rollout(0.0)])
    make_report([odd, runs[1]], tmp_path / "out" / "report.html", Console(file=io.StringIO()))
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("</script>") == 1 and "\\u003c/script>1+1=" in text and "a<b>" not in text
    assert re.findall(r"(?:src|href)\s*=|url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []
    (data,) = re.findall(r"const DATA = (.*);\n", text)
    assert json.loads(data)["groups"][0]["name"] == "a<b>&c"


def test_the_picture_draws_every_run_in_every_panel_that_has_it(runs: list[Path]) -> None:
    figure = plot(groups(*runs))
    panels = {axis.get_title(loc="left"): {line.get_color() for line in axis.lines} for axis in figure.axes}
    assert len(panels) == 6
    assert [len(colours) for title, colours in panels.items() if "KL" in title] == [1]
    assert all(len(colours) == 2 for title, colours in panels.items() if "KL" not in title)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kdrl", "grpo"]


@pytest.mark.filterwarnings("error")
def test_a_study_is_drawn_where_settings_or_all_of_it_are_missing() -> None:
    panels = {"study": {"a": Interval(0.5, 0.1), "b": Interval(0.6, None)}, "not begun": {}}
    assert intervals_picture("accuracy", panels).startswith(PNG_SIGNATURE)


def test_watching_ends_with_the_runs_and_the_last_page_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "experiment=tiny_cpu", steps=3, planned=4)
    output = tmp_path / "report.html"
    watcher = threading.Thread(
        target=watch, args=([run, tmp_path / "later"], output, 0.05, Console(file=io.StringIO())), daemon=True
    )
    watcher.start()
    while not output.is_file():
        watcher.join(0.05)
    assert '"reload":0.05' in output.read_text() and watcher.is_alive()
    with MetricsLog(run, tensorboard=False) as log:
        log.write(4, {"reward": 0.9})
    write_run(tmp_path / "later", "experiment=tiny_cpu", "trainer.seed=2", steps=4)
    watcher.join(30)
    assert not watcher.is_alive() and '"reload":null' in output.read_text() and '"step":4,"steps":4' in output.read_text()
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_command_prints_the_table_and_writes_the_picture(runs: list[Path], tmp_path: Path) -> None:
    done = report(*map(str, runs), "--output", str(tmp_path / "report.png"))
    assert done.returncode == 0 and "kdrl" in done.stdout and "\x1b" not in done.stdout, done.stderr
    assert (tmp_path / "report.png").read_bytes().startswith(PNG_SIGNATURE)


def test_bad_input_is_one_line_and_an_exit_code(runs: list[Path], tmp_path: Path) -> None:
    done = report(str(runs[0]), str(tmp_path / "nowhere"), "--output", str(tmp_path / "report.html"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr and not (tmp_path / "report.html").exists()
    (tmp_path / "empty").mkdir()
    console = Console(file=io.StringIO())
    with pytest.raises(DataError, match="empty"):
        make_report([tmp_path / "empty"], tmp_path / "report.html", console)
    with pytest.raises(ConfigError, match=r"report\.pdf"):
        make_report(runs, tmp_path / "report.pdf", console)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        watch(runs, tmp_path / "report.png", 1, console)
    with pytest.raises(DataError, match="cannot be written"):
        make_report(runs, runs[0] / "metrics.jsonl" / "report.html", console)


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
