"""The report distinguishes configurations, gets numbers and intervals right, stays small, and answers bad input with one
line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kdrl_mcore.cli.report import make_report, watch
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.alerts import check_alerts
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.studies.report import page
from kdrl_mcore.studies.report.alerts import faults_of
from kdrl_mcore.studies.report.page import page_data, write_page
from kdrl_mcore.studies.report.picture import intervals_picture, plot
from kdrl_mcore.studies.report.rollouts import sample_rollouts
from kdrl_mcore.studies.report.runs import Group, by_configuration, differences, read_runs, run_names
from kdrl_mcore.studies.summary import FINAL_STEPS, STATISTICS, Interval, t_interval
from tests.support import ROOT
from tests.support.reported_runs import rollout, write_run

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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
    assert interval is not None and (interval.mean, interval.seeds) == (3.0, 5)
    assert [interval.low, interval.high] == pytest.approx([3 + sign * 2.7764451 * np.sqrt(2.5 / 5) for sign in (-1, 1)])
    many = t_interval(np.random.default_rng(0).normal(size=200))
    assert many is not None and many.high is not None and many.high - many.mean == pytest.approx(1.96 / np.sqrt(200), rel=0.1)


def test_a_single_run_has_its_own_intervals_and_several_seeds_theirs() -> None:
    accuracy, start, reward = (each for each in STATISTICS if each.key in ("accuracy", "accuracy_at_start", "reward"))
    held_out = {"eval/accuracy": 0.6, "eval/accuracy_low": 0.55, "eval/accuracy_high": 0.66}
    rows = [{"step": float(step), "reward": 0.5, "reward_stderr": 0.1} for step in range(1, 8)]
    rows[-1] |= held_out
    assert accuracy.over([rows]) == Interval(0.6, 0.55, 0.66)
    one = reward.over([rows])
    assert one is not None and one.high == pytest.approx(0.5 + 1.96 * 0.1 / np.sqrt(FINAL_STEPS))  # five independent steps
    assert one.text(reward.form) == "0.500 [0.412, 0.588]" and Interval(0.5).text(reward.form) == "0.500"
    other = [{**row, "reward": 0.7} for row in rows]
    assert reward.over([rows, other]) == t_interval([0.5, 0.7])
    assert reward.over([[{"step": 1.0, "reward": 0.5}, *rows[1:]]]) is not None  # older steps without a standard error
    assert reward.over([[*rows[:-1], {"step": 7.0, "reward": 0.5}]]) == Interval(0.5)
    # A value that was first measured later is not the run's starting value.
    assert start.over([rows]) is None and start.over([[{"step": 0.0, **held_out}, *rows]]) == Interval(0.6, 0.55, 0.66)


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
    again = write_run(tmp_path / "again", *base, "trainer.seed=1")  # the same draw again is not a second seed
    assert [[run.name for run in group.runs] for group in groups(*directories[:2], again, again)] == [
        ["kdrl-seed1-0123abcd", "another name"],
        ["again"],
    ]
    without = write_run(tmp_path / "without")  # a missing configuration is not a difference
    assert differences(groups(*directories, without)) == {"objective.beta.init": [0.002, 0.5, None]}


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


def test_big_runs_stay_small_and_a_file_in_the_making_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_run(tmp_path / "long", steps=1500)
    for step in (1, 2, 3, 1500):
        write_rollouts(directory / "rollouts" / f"step_{step:06d}.jsonl", [rollout(i, tokens=4000) for i in range(8)])
    (directory / "rollouts" / "step_000003.jsonl").write_text('{"prompt_id": 1, "gr')
    monkeypatch.setattr(page, "MAX_POINTS", 20_000)
    copies = [Path(shutil.copytree(directory, tmp_path / name)) for name in ("long-b", "long-c")]
    found = [Group(run.name, [run]) for run in read_runs([directory, *copies])]
    data = page_data(found)
    assert len(write_page(found)) < 2_000_000
    prompts = data["rollouts"][0]["prompts"]
    assert prompts and {prompt["step"] for prompt in prompts} <= {1, 2, 1500}
    assert {len(answer["tokens"]) + answer["cut"] for prompt in prompts for answer in prompt["responses"]} == {4000}
    run, width = data["groups"][0]["runs"][0], data["width"]
    rewards = run["y"]["reward"]
    assert len(rewards) == len(run["x"]) == 1 + np.ceil(1500 / width) and width > 2 and run["x"][-1] == 1500
    assert rewards[:2] == [None, pytest.approx((1 + width) / 20, abs=1e-3)]  # step 0 does not train; the mean over a bin
    assert run["tokens"][-1] == 1_500_000 and run["seconds"][-1] == 753


def test_what_is_not_finite_leaves_a_gap_only(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step, loss in ((1, 1.0), (2, float("nan")), (3, float("inf")), (4, 3.0)):
            log.write(step, {"reward": loss})
    data = page_data(groups(tmp_path))
    assert data["groups"][0]["runs"][0]["y"]["reward"] == [1.0, None, None, 3.0] and cells(data, 0) == {"reward": "2.000"}
    (alert,) = data["alerts"]
    assert (alert["name"], alert["first"], alert["last"], alert["count"]) == ("not finite", 2, 3, 2)
    assert alert["message"].endswith(": reward")
    plot(groups(tmp_path))


def test_every_alert_is_told_once_with_its_first_and_last_step_and_how_often_it_showed(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "bad") as log:
        for step in range(1, 301):  # so long that looking only at every other step would miss it
            low = 50 <= step < 55 or step >= 280
            kl, skipped = 0.5 if step == 99 else 0.02, float(step == 7)
            log.write(step, {"reward": 0.01 if low else 0.8, "kl": kl, "skipped_updates": skipped})
    rows = read_runs([tmp_path / "bad"])[0].rows
    showing = [{alert.name for alert in check_alerts(rows[:end])} for end in range(1, 301)]
    steps = {name: [end for end, names in enumerate(showing, start=1) if name in names] for name in set.union(*showing)}
    expected = {name.replace("_", " "): (at[0], at[-1], len(at)) for name, at in steps.items()} | {"updates skipped": (7, 7, 1)}
    faults = faults_of(rows)
    assert len(faults) == len(expected) == 3  # the reward, twice; the KL, for some steps; an update
    assert {fault.name: (fault.first, fault.last, fault.count) for fault in faults} == expected
    assert [alert["first"] for alert in page_data(groups(tmp_path / "bad"))["alerts"]] == [fault.first for fault in faults]


def test_the_record_of_starts_is_shown_and_missing_or_damaged_ones_are_no_hindrance(tmp_path: Path) -> None:
    told = {
        "command": "python -m kdrl_mcore.train a='<b>'",
        "versions": {"torch": "2.0", "vllm": None},
        "commit": "abc",
        "host": "n1",
    }
    again = told | {"resumed_from": "checkpoints/step_000004", "step": 4, "world_size": 8, "changes": ["optimizer.lr 1 -> 2"]}
    runs = {name: write_run(tmp_path / name) for name in ("listed", "keyed", "none", "torn")}
    (runs["listed"] / "run.json").write_text(json.dumps([{"command": ["train", "a=b c"]}]))
    (runs["keyed"] / "run.json").write_text(json.dumps({"starts": [told, again], "branch": {}}))
    (runs["torn"] / "run.json").write_text('{"starts": [')
    data = page_data(groups(*runs.values()))
    listed, keyed, none, torn = (record["starts"] for record in data["runs"])
    assert listed[0]["command"] == "train 'a=b c'" and none == torn == []
    assert [start["versions"] for start in keyed] == ["torch 2.0"] * 2 and keyed[1]["changes"] == ["optimizer.lr 1 -> 2"]
    assert data["notes"] == ["torn: run.json cannot be read: it has no list of starts"]
    assert "a=&#x27;&lt;b&gt;&#x27;" in write_page(groups(*runs.values())).split("<script>")[0]


def test_damaged_unfinished_and_empty_runs_are_told_in_a_line_each(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", "experiment=tiny_cpu", steps=4, planned=9)
    with (good / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "rew\x00\xff\n{"step": NaN}\n[]\n{"step": 5, "reward": 0.5}\n{"step": 6, "rew')
    torn = write_run(tmp_path / "torn")
    (torn / "config.yaml").write_text("a: [")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    (tmp_path / "new").mkdir()
    output = io.StringIO()
    make_report([good, torn, tmp_path / "empty", tmp_path / "new"], tmp_path / "report.html", Console(file=output, width=200))
    (text,) = re.findall(r"const DATA = (.*);\n", (tmp_path / "report.html").read_text())
    notes = json.loads(text)["notes"]
    for words in (
        r"left out: .*empty.*no metrics yet", r"left out: .*new: no metrics\.jsonl", r"good: .*3 lines .*line 7, \.\.\.",
        r"torn: its configuration cannot be read", r"good \(step 5 of 9\)", r"good \(step 4 of 5 trained\)",
    ):  # fmt: skip
        assert len([note for note in notes if re.search(words, note)]) == 1, (words, notes)
        assert words.startswith("good \\(") or re.search(words, output.getvalue())
    with pytest.raises(DataError, match="no metrics yet"):
        make_report([tmp_path / "empty"], tmp_path / "report.html", Console(file=output))


def odd_runs(folder: Path) -> dict[str, Path]:
    """Run directories with content that no run of this version writes, by its description."""
    base = ("experiment=tiny_cpu", "objective=kdrl", "student.path=moved/away")
    names = {"steps": "bad steps", "spike": "a $x_{1$ b", "nothing": "_first", "version": "version", "rollouts": "rollouts"}
    names |= {"tokenizer": "tokenizer", "bytes": os.fsdecode(b"bytes \xff")}
    runs = {
        what: write_run(folder / what, *base, f"optimizer.lr={number}e-5", steps=3).rename(folder / name)
        for number, (what, name) in enumerate(names.items(), start=1)
    }
    lines = [{"step": step, "loss": 1.0} for step in (-1, 0.5, 1e24, 10**13)]
    with (runs["steps"] / "metrics.jsonl").open("a") as file:
        file.write("\n".join(["", "   ", *map(json.dumps, lines), ""]))
    with MetricsLog(runs["spike"]) as log:
        log.write(4, {"reward": 1e308, "loss": 1.0, "kl": 1e-300})
        log.write(5, {"reward": 1e308, "loss": -1e300, "kl": 1e99, "kl_stderr": 1e99})
    (runs["nothing"] / "metrics.jsonl").write_text('{"step": 0, "a metric of another version": 1}\n')
    (runs["version"] / "config.yaml").write_text("trainer:\n  steps: ${no.such}\n  seed: first\n1: 2\nold:\n  key: [{a: 1}]\n")
    for what in ("rollouts", "tokenizer"):
        kept = runs[what] / "rollouts"
        write_rollouts(kept / "step_000001.jsonl", [rollout(1.0), rollout(0.0)])
        for name in ("step_000001 (copy).jsonl", "step_.jsonl"):
            shutil.copy(kept / "step_000001.jsonl", kept / name)
        (kept / "step_000002.jsonl").mkdir()
        (kept / "step_000003.jsonl").write_bytes(b"\xff\xfe{}")
    (runs["tokenizer"] / "hf").mkdir()
    (runs["tokenizer"] / "hf" / "tokenizer.json").write_text('{"a": 1}')
    return runs


def test_what_no_run_of_this_version_writes_costs_no_other_run_its_place(tmp_path: Path) -> None:
    runs = odd_runs(tmp_path)
    output = io.StringIO()
    make_report(list(runs.values()), tmp_path / "report.html", Console(file=output, width=200))
    make_report([runs["spike"], runs["bytes"], runs["nothing"]], tmp_path / "report.png", Console(file=io.StringIO()), True)
    assert "bad steps: metrics.jsonl: 4 lines cannot be read and are left out (line 8, ...)" in output.getvalue()
    (text,) = re.findall(r"const DATA = (.*);\n", (tmp_path / "report.html").read_text())
    data = json.loads(text)
    assert {group["name"] for group in data["groups"]} == {
        *("bad steps", "a $x_{1$ b", "_first", "version", "rollouts", "tokenizer", "bytes \ufffd")
    }
    spike = next(group for group in data["groups"] if "$" in group["name"])["runs"][0]["y"]
    assert spike["reward"][-2:] == [None, None] and spike["loss"][-2:] == [1.0, None] and spike["kl"][-1] == 1e99
    assert {sample["run"]: [prompt["step"] for prompt in sample["prompts"]] for sample in data["rollouts"]} == {
        "rollouts": [1],
        "tokenizer": [1],
    }
    assert data["rollouts"][0]["prompts"][0]["responses"][0]["tokens"] == ["[1]", "[2]", "[3]"]


def test_short_runs_are_not_smoothed_and_only_what_a_run_has_gets_a_panel(tmp_path: Path) -> None:
    short, long = write_run(tmp_path / "short", steps=99), write_run(tmp_path / "long", steps=100)
    assert [page_data(groups(run))["smoothing"] for run in (short, long)] == [1, 5]
    keys = [each["key"] for each in page_data(groups(short))["curves"]]
    assert {"tokens_per_second", "time/evaluation", "eval/greedy_accuracy", "kl"} < set(keys) and "memory" not in keys
    with MetricsLog(tmp_path / "gpu") as log:
        for step in range(1, 4):
            log.write(step, {"memory/train": 60.0 + step, "memory/rollout": 62.0, "lr": 1e-6, "time/refit": 1.0})
    data = page_data(groups(tmp_path / "gpu"))
    assert [each["key"] for each in data["curves"]] == ["lr", "time/refit", "memory"]
    assert data["groups"][0]["runs"][0]["y"]["memory"] == [62.0, 62.0, 63.0]


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
    figure = plot(groups(*runs), main_panels=True)
    panels = {axis.get_title(loc="left"): {line.get_color() for line in axis.lines} for axis in figure.axes}
    assert len(panels) == 6
    assert [len(colours) for title, colours in panels.items() if "KL" in title] == [1]
    assert all(len(colours) == 2 for title, colours in panels.items() if "KL" not in title)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kdrl", "grpo"]
    every = {axis.get_title(loc="left"): axis for axis in plot(groups(*runs)).axes}
    assert set(panels) < set(every) and {"Tokens per second (tokens/s)", "Time of an evaluation (s)"} < set(every)
    same = every["Response length (tokens)"].lines  # both are 40 throughout: each line shows half of the dashes
    assert [line.is_dashed() for line in same] == [True, True]


@pytest.mark.filterwarnings("error")
def test_a_study_is_drawn_where_settings_or_all_of_it_are_missing() -> None:
    panels = {"study": {"a": Interval(0.5, 0.4, 0.6), "b": Interval(0.6)}, "not begun": {}}
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
    with MetricsLog(run) as log:
        log.write(4, {"reward": 0.9})
    write_run(tmp_path / "later", "experiment=tiny_cpu", "trainer.seed=2", steps=4)
    watcher.join(30)
    assert not watcher.is_alive() and '"reload":null' in output.read_text() and '"step":4,"steps":4' in output.read_text()
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_command_prints_the_table_and_writes_the_picture(runs: list[Path], tmp_path: Path) -> None:
    done = report(*map(str, runs), "--main-panels", "--output", str(tmp_path / "report.png"))
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
    command = [sys.executable, "-m", "kdrl_mcore.cli", "report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
