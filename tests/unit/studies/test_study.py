"""Studies become runs that share equal parts; runs are trained once, survive interruptions, and are collected.

The runs use a stand-in for `kdrl_mcore.train` that a child process finds first: it "trains" in a moment.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from scipy.stats import ttest_rel

from examples.tiny.make_pair import TASKS
from kdrl_mcore.cli import study as experiments
from kdrl_mcore.config import CHOICES, Config, conf_dir, load_config, save_config
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.parallel.layout import Layout, student_layout
from kdrl_mcore.studies import planned, scaling, slurm, study
from kdrl_mcore.studies.comparison import holm, paired_p
from kdrl_mcore.studies.local import Outcome, is_finished, run_missing
from kdrl_mcore.studies.results import finished_by_setting, markdown, table, write_csv
from kdrl_mcore.studies.study import StudyRun, find_study, identify, load_study, read_config
from tests.reference.tiny_models import make_qwen2
from tests.support import ROOT

STUDIES = ROOT / "conf" / "study"
STUDY = """
base: pair
grid:
  method:
    kdrl: [objective=kdrl, "objective.beta.init=${times:2e-3,${scale}}"]
    grpo: [objective=grpo]
"""
SHARING = """
base: pair
grid:
  estimator: {k2: [objective=kdrl, objective.beta.init=0.02, objective.kd.estimator=k2]}
  length: {short: [trainer.steps=2], long: [trainer.steps=9]}
"""
PLANNED = """
planned: true
root: {root}
overrides: [cluster=h100, objective=grpo, student.path={root}/model, rollout.max_response_tokens=512]
grid:
  layout: {{TP2: [parallel.tensor=2], TP3: [parallel.tensor=3]}}
  nodes: {{"1": [cluster.nodes=1], "2": [cluster.nodes=2]}}
  run: {{strong: [rollout.prompts_per_step=64], weak: ["rollout.prompts_per_step=${{times:48,${{nodes}}}}"]}}
"""
BASE = "root: {root}\nseeds: [1, 2]\nscale: 10\noverrides: [experiment=tiny_cpu, trainer.steps=2]\n"
STAND_IN = '''
"""Trains in a moment, as its overrides say: data.train=fail fails, data.train=wait waits to be asked to stop."""
import json, os, signal, sys, time
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(settings["run.dir"])
with (run / "starts").open("a") as file:
    file.write(f"{os.environ['OMP_NUM_THREADS']}\\n")
kind = settings.get("data.train")
if kind == "fail" and settings["trainer.seed"] == "1":
    sys.exit("error: data.train=fail does not exist")
if kind == "wait":
    def stop(*_):
        (run / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (run / "waits").touch()
    time.sleep(120)
accuracy = 0.5 + int(settings["trainer.seed"]) / 10
(run / "metrics.jsonl").write_text(json.dumps({"step": int(settings["trainer.steps"]), "eval/accuracy": accuracy}) + "\\n")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the studies `study` and `sharing` and the stand-in; it is the current one, so that a child finds it
    first."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pair.yaml").write_text(BASE.format(root=tmp_path / "runs"))
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "sharing.yaml").write_text(SHARING)
    (tmp_path / "kdrl_mcore").mkdir()
    (tmp_path / "kdrl_mcore" / "__init__.py").touch()
    (tmp_path / "kdrl_mcore" / "train.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(runs: list[StudyRun], jobs: int = 2) -> list[Outcome]:
    outcomes: list[Outcome] = []
    assert run_missing(runs, jobs, outcomes.append)
    return outcomes


def starts(run: StudyRun) -> int:
    return len((run.directory / "starts").read_text().splitlines())


def test_a_study_is_the_product_of_its_axes_and_seeds_first_seeds_first(folder: Path) -> None:
    runs = load_study(folder / "study.yaml")
    assert [run.name for run in runs] == ["kdrl, seed 1", "grpo, seed 1", "kdrl, seed 2", "grpo, seed 2"]
    assert "objective.beta.init=0.02" in runs[0].overrides and runs[0].directory.name.startswith("kdrl-seed1-")
    assert len({run.identity for run in runs}) == 4
    changed = load_study(folder / "study.yaml", ["seeds=[7]", "scale=20", "optimizer.lr=1e-3"])
    assert [run.seed for run in changed] == [7, 7]
    assert {"objective.beta.init=0.04", "optimizer.lr=1e-3"} <= set(changed[0].overrides)
    both = load_study(folder / "sharing.yaml")
    assert [run.setting for run in both[:2]] == [("k2", "short"), ("k2", "long")]


def test_an_axis_is_restricted_to_what_is_asked_for(folder: Path) -> None:
    path = folder / "study.yaml"
    axis = load_study(path)[0].axes[0]
    assert [run.name for run in load_study(path, only={axis: ["grpo"]})] == ["grpo, seed 1", "grpo, seed 2"]
    with pytest.raises(ConfigError, match=f"'{axis}' has no choice 'gprpo'; it has kdrl, grpo"):
        load_study(path, only={axis: ["gprpo"]})
    with pytest.raises(ConfigError, match=f"no axis 'metod': its axes are {axis}"):
        load_study(path, only={"metod": ["grpo"]})


def test_the_same_configuration_is_the_same_run_in_every_study(folder: Path) -> None:
    first, shared = load_study(folder / "study.yaml")[0], load_study(folder / "sharing.yaml")[0]
    assert first.identity == shared.identity  # k2 is the default, 0.02 = 10 * 2e-3
    first.directory.mkdir(parents=True)
    assert shared.directory == first.directory != load_study(folder / "sharing.yaml")[1].directory


def test_the_identity_is_that_of_the_configuration_a_run_wrote(folder: Path) -> None:
    run = load_study(folder / "study.yaml")[0]
    run.directory.mkdir(parents=True)
    save_config(load_config([*run.overrides, f"run.dir={run.directory}"]), run.directory / "config.yaml")
    assert identify(read_config(run.directory)) == run.identity


def test_finished_runs_are_skipped_and_a_failed_one_stops_no_other(folder: Path) -> None:
    runs = load_study(folder / "study.yaml", ["data.train=fail"])
    outcomes = {outcome.run.name: outcome for outcome in train(runs)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        **{"kdrl, seed 1": "failed", "grpo, seed 1": "failed"},
        **{"kdrl, seed 2": "finished", "grpo, seed 2": "finished"},
    }
    assert "exit code 1: error: data.train=fail does not exist" in outcomes["kdrl, seed 1"].message
    assert [is_finished(run) for run in runs] == [False, False, True, True]
    assert [outcome.run.seed for outcome in train(runs)] == [1, 1]
    assert [starts(run) for run in runs] == [2, 2, 1, 1]
    assert (runs[2].directory / "starts").read_text() == "1\n"  # one thread each


def test_results_are_a_line_a_run_and_an_interval_a_setting(folder: Path) -> None:
    runs = load_study(folder / "study.yaml")
    train(runs[:3])
    write_csv(runs, folder / "runs" / "study.csv")
    rows = list(csv.DictReader((folder / "runs" / "study.csv").open()))
    assert [(row["setting"], row["seed"], row["finished"], row["accuracy"]) for row in rows] == [
        *(("kdrl", "1", "True", "0.6"), ("grpo", "1", "True", "0.6"), ("kdrl", "2", "True", "0.7"), ("grpo", "2", "False", "")),
    ]
    header, kdrl, grpo = table(finished_by_setting(runs))
    assert header[:3] == ["setting", "seeds", "accuracy"] and "avg@1" not in "".join(header)
    assert kdrl[:3] == ["kdrl", "2", f"65.0% ± {12.706 * 0.05:.1%}"] and grpo[:3] == ["grpo", "1", "60.0%"]
    assert markdown([header, kdrl]).splitlines()[0].startswith("| setting | seeds |")


def test_each_of_several_benchmarks_has_a_column(folder: Path) -> None:
    runs = load_study(folder / "study.yaml")[:2]
    for run, sums in zip(runs, (0.5, 0.25), strict=True):
        with MetricsLog(run.directory) as log:
            log.write(run.steps, {"eval/accuracy": sums + 0.1, "eval/sums/avg@2": sums, "eval/logic/avg@2": sums + 0.2})
    header, *rows = table(finished_by_setting(runs))
    assert header[2:5] == ["accuracy", "sums", "logic"]
    assert [row[3:5] for row in rows] == [["50.0%", "70.0%"], ["25.0%", "45.0%"]]
    write_csv(runs, folder / "several.csv")
    written = list(csv.DictReader((folder / "several.csv").open()))
    assert [(row["accuracy/sums"], row["accuracy/logic"]) for row in written] == [("0.5", "0.7"), ("0.25", "0.45")]


def test_accuracy_at_equal_time_is_that_of_the_last_evaluation_within_the_fastest_runs_time(folder: Path) -> None:
    runs = load_study(folder / "study.yaml")[:2]
    for run, seconds in zip(runs, (1.0, 1.8), strict=True):
        with MetricsLog(run.directory) as log:
            for step in (1, 2):
                log.write(step, {"time/step": seconds, "time/evaluation": 9.0, "eval/accuracy": step / 10})
    header, fast, slow = table(finished_by_setting(runs))
    assert header[2:4] == ["accuracy", "within 2 s"]
    assert (fast[2:4], slow[2:4]) == (["20.0%", "20.0%"], ["20.0%", "10.0%"])


def test_the_command_runs_collects_and_names_what_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        return experiments.main(list(words)), *capsys.readouterr()

    code, shown, errors = call("study.yaml", "--jobs", "2", "data.train=fail")
    assert code == 1 and "2/4" in shown and "65.0%" not in shown
    assert [line.split(",")[0] for line in errors.splitlines()] == ["error: kdrl", "error: grpo"]
    code, shown, errors = call("study.yaml", "sharing.yaml", "--jobs", "2", "seeds=[1]")
    assert (code, errors) == (0, "") and "3 runs, 0 of them finished before" in shown  # four, one of which is shared
    written = sorted(path.name for path in (folder / "runs").glob("*.*") if path.is_file())
    assert written == ["accuracy.png", "sharing.csv", "sharing.md", "study.csv", "study.md"]
    code, shown, _ = call("--collect", "study.yaml")
    assert code == 1 and "2 of 4 runs are not finished" in shown
    code, _, errors = call("study.yaml", "optimizer.lrr=1")
    assert code == 2 and errors.startswith("error: unknown configuration key 'optimizer.lrr'")


def test_a_study_of_the_package_is_found_by_its_name_and_the_old_path_names_the_new_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_study("main") == STUDIES / "main.yaml" and find_study("study.yaml") == Path("study.yaml")
    for old in ("conf/experiments/main.yaml", f"{ROOT}/conf/experiments/main.yaml"):
        assert experiments.main([old]) == 2
        assert (
            capsys.readouterr().err
            == f"error: {old}: the studies have moved to conf/study: write main or conf/study/main.yaml\n"
        )
    assert experiments.main(["mian"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: no such study 'mian'; there are: coefficient, ") and "did you mean 'main'?" in errors


def test_a_planned_study_is_planned_collected_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder / "runs"
    (folder / "planned.yaml").write_text(PLANNED.format(root=root))
    monkeypatch.syspath_prepend(str(ROOT))  # not the stand-in
    runs = load_study(folder / "planned.yaml")
    assert len(runs) == 8 and all(run.planned and (run.nodes, run.ranks) == (1, 1) for run in runs)
    assert runs[3].name == "TP2 2 weak" and "rollout.prompts_per_step=96" in runs[3].overrides
    make_qwen2(root / "model", seed=1, num_layers=1)
    monkeypatch.chdir(ROOT)

    def call(*words: str) -> tuple[int, str]:
        return experiments.main([str(folder / "planned.yaml"), *words]), capsys.readouterr().out

    assert planned.main([*runs[0].overrides, f"run.dir={runs[0].directory}"]) == 0  # an element of a job array
    code, shown = call("--jobs", "2")
    assert code == 0 and "8 runs, 1 of them finished before" in shown and "  7/7 " in shown
    rows = list(csv.DictReader((root / "planned.csv").open()))
    assert [row["gpus"] for row in rows] == ["8", "8", "16", "16", *4 * [""]] and {row["planned"] for row in rows} == {"True"}
    page = (root / "planned.md").read_text()
    assert "not a measurement" in page and "TP3 on 1 nodes" in page and "| TP2 |" in page
    assert (root / "images" / "planned.png").stat().st_size > 1000
    first, second = scaling.collect_points(runs)
    assert second.gpus == 2 * first.gpus and second.weak is not None and second.grpo is None
    assert scaling.strong_efficiency(first, second) == pytest.approx(first.strong["seconds"] / second.strong["seconds"] / 2)
    assert scaling.weak_efficiency(first, second) == pytest.approx(1, abs=0.2)

    before = (runs[1].directory / "plan.json").stat().st_mtime_ns
    (runs[0].directory / "plan.json").unlink()
    assert is_finished(runs[1]) and not is_finished(runs[0]) and scaling.read_answer(runs[0]) is None
    code, shown = call()
    assert code == 0 and "1/1 TP2 1 strong: finished" in shown
    assert (runs[1].directory / "plan.json").stat().st_mtime_ns == before
    assert planned.main(["student.path=nowhere", "cluster=h100", "objective=grpo", f"run.dir={root}/x"]) == 2
    assert "student.path=nowhere has no config.json" in capsys.readouterr().err and not (root / "x").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_grid_lets_its_runs_save_and_goes_on(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-P", "-c", CALL, str(folder / "study.yaml"), "data.train=wait"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE
    )
    runs = load_study(folder / "study.yaml", ["data.train=wait"])
    wait_for(lambda: all((run.directory / "waits").is_file() for run in runs[:2]))
    other: list[Outcome] = []
    runs_elsewhere = [run for run in runs if (run.directory / "waits").is_file()]
    assert run_missing(runs_elsewhere, 1, other.append)  # a second runner leaves them alone
    assert [outcome.status for outcome in other] == ["running elsewhere"] * 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=200)
    assert output.split() == ["stopped", "stopped", "False"]
    assert [(run.directory / "saved").is_file() for run in runs_elsewhere] == [True, True]
    assert [run.directory.is_dir() for run in runs[2:]] == [False, False]  # no new run was started


CALL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from pathlib import Path
from kdrl_mcore.studies.comparison import holm, paired_p
from kdrl_mcore.studies.local import run_missing
from kdrl_mcore.studies.study import load_study
os.environ.pop("PYTHONPATH")
runs = load_study(Path(sys.argv[1]), sys.argv[2:])
print(run_missing(runs, 2, lambda outcome: print(outcome.status)))
"""


def wait_for(condition: object, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_what_is_missing_is_submitted_and_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    queue = ["7 1\n"]

    def answer(command: list[str]) -> str:
        calls.append(command)
        return {"sbatch": f"{6 + sum(call[0] == 'sbatch' for call in calls)}\n", "squeue": queue[0]}.get(command[0], "")

    monkeypatch.setattr(slurm, "_run", answer)
    runs = load_study(folder / "study.yaml")
    train(runs[:1])
    assert "job 7: 3 runs on 1 node" in list(slurm.submit(runs, "--partition=gpu"))[-1]
    assert {"--array=0-2", "--partition=gpu", "--nodes=1"} <= set(calls[0]) and calls[1] == ["scontrol", "release", "7"]
    lines = (folder / "runs" / ".slurm" / "7").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [[run.identity, "train"] for run in runs[1:]]
    assert lines[0].endswith(f"run.dir={runs[1].directory}")
    list(slurm.submit(runs))  # the second of the three is still queued
    again = (folder / "runs" / ".slurm" / "8").read_text().splitlines()
    assert [line.split()[0] for line in again] == [runs[1].identity, runs[3].identity]


def test_bad_studies_and_overrides_are_named(folder: Path) -> None:
    for text, problem in {
        "grid: {method: {}}": "base",
        "base: other\ngrid: {}": "that folder holds: pair",
        "base: pair": "grid",
        "base: pair\ngrid: {method: {a: objective=grpo}}": "named lists",
        "base: pair\ngrid: {method: {a: ['${nothing}']}}": "nothing",
        "base: [": "YAML",
    }.items():
        (folder / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=problem):
            load_study(folder / "bad.yaml")
    with pytest.raises(ConfigError, match=r"that folder holds: .*sharing, study"):
        load_study(folder / "absent.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.lr'"):
        load_study(folder / "study.yaml", ["optimizer.lrr=1"])
    with pytest.raises(ConfigError, match="--slurm"):
        run_missing(load_study(folder / "study.yaml", ["cluster.nodes=2"]), 1, lambda _: None)
    if not any((Path(folder) / "sbatch").is_file() for folder in os.environ["PATH"].split(os.pathsep)):
        with pytest.raises(KdrlError, match="sbatch is not installed"):
            list(slurm.submit(load_study(folder / "study.yaml")))


@cache
def composed(overrides: tuple[str, ...]) -> Config:
    return load_config(overrides)


@pytest.mark.parametrize("base", sorted(path.stem for path in (STUDIES / "base").glob("*.yaml") if path.stem != "when"))
def test_every_study_composes_for_every_pair(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "load_config", lambda overrides: composed(tuple(overrides)))
    files = {path.stem: path for path in sorted(STUDIES.glob("*.yaml")) if OmegaConf.load(path).get("base", "when") != "when"}
    sizes = {"estimator": 5, "coefficient": 6, "mask": 3, "teacher": 2 * 3, "scale": 3 * 3}
    for name, choices in (("teacher", "teachers"), ("scale", "students")):
        if choices not in OmegaConf.load(STUDIES / "base" / f"{base}.yaml"):  # a pair without a choice
            with pytest.raises(ConfigError, match=f"'{choices}' not found"):
                load_study(files.pop(name), [f"base={base}", "seeds=[1]"])
            del sizes[name]
    studies = {name: load_study(path, [f"base={base}", "seeds=[1]"]) for name, path in files.items()}
    settings = {name: {" ".join(run.setting): run for run in runs} for name, runs in studies.items()}
    methods = {"start", "sft", "grpo", "kd_rkl", "kdrl", "kdrl_annealing", "kdrl_response_mask", "kdrl_group_mask"}
    assert settings.pop("main").keys() == methods | {"reward_shaping", "distill_then_grpo"}
    presets = {path.stem for path in (conf_dir() / "objective").glob("*.yaml")}
    in_main = {name.replace("start", "grpo") for name in methods} | {"reward_shaping", "distill_then_grpo"}
    assert settings.pop("methods").keys() == presets - in_main | {"start", "grpo", "kd_rkl", "kdrl"}
    later = {"start", "grpo", "opd", "kdrl_puzzles", "kdrl_countdown", "kdrl_mathematics", "kdrl_annealing", "opd_then_rl"}
    assert settings.pop("sequential").keys() == later
    assert {name: len(runs) for name, runs in settings.items()} == sizes
    assert settings["estimator"].keys() < set(CHOICES["objective.kd.estimator"])
    assert settings["mask"].keys() == set(CHOICES["objective.kd.mask"])
    shared = {run.setting: run.identity for run in studies["main"]}
    assert {settings["estimator"]["k2"].identity, settings["coefficient"]["constant_2"].identity} == {shared["kdrl",]}
    assert settings["mask"]["none"].identity == shared["kdrl",]
    assert settings["coefficient"]["annealed_5"].identity == shared["kdrl_annealing",]
    scale = 25 if base in ("tiny", "smollm2") else 1  # the paper's numbers if nothing was re-tuned
    for name, run in settings["coefficient"].items():
        kind, thousandths = name.split("_")
        beta = composed(run.overrides[:-1]).objective.beta
        assert beta.init == pytest.approx(scale * float(thousandths) / 1000)
        assert kind == "constant" or beta.min == pytest.approx(beta.init / 5)
    for runs in studies.values():
        assert len({run.identity for run in runs}) == len(runs)
        for run in runs:
            parallel, teacher = (config := composed(run.overrides[:-1])).parallel, config.teacher.parallel
            student_layout(run.ranks * run.nodes, parallel)  # refuses what does not fit the machine
            Layout(run.ranks * run.nodes, teacher.tensor, teacher.pipeline)


def test_the_study_of_six_tasks_uses_what_its_tuning_chose(tmp_path: Path) -> None:
    base = OmegaConf.load(STUDIES / "base" / "when.yaml")
    assert set(base.tasks) == set(base.folders) == set(base.tuned) - {"default"} <= set(TASKS)
    for name, task in TASKS.items():
        if name in base.tasks:
            assert base.folders[name] == str(task.directory) and set(base.tasks[name]) == set(task.overrides)
    assert set(base.methods) == set(base.choices) == set(base.tuned.default)
    base.tasks, base.tuned.verbose = {"verbose": base.tasks.verbose}, dict(base.tuned.default) | {"kdrl_annealing": "d"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "when.yaml").write_text(OmegaConf.to_yaml(base))
    (tmp_path / "when.yaml").write_text((STUDIES / "when.yaml").read_text())
    runs = {run.setting: run for run in load_study(tmp_path / "when.yaml", ["seeds=[1]"])}
    assert runs.keys() == {("verbose", method) for method in base.methods}
    config = composed(runs["verbose", "kdrl_annealing"].overrides)
    assert (config.objective.beta.init, config.rollout.max_response_tokens) == (0.3, 96)
    assert config.objective.beta.min == pytest.approx(0.06) and config.data.train == "runs/tiny_verbose/data/train.jsonl"
    base.methods = {"kdrl": base.methods.kdrl}
    (tmp_path / "base" / "when.yaml").write_text(OmegaConf.to_yaml(base))
    (tmp_path / "tuning.yaml").write_text((STUDIES / "when_tuning.yaml").read_text())
    tuning = [composed(run.overrides) for run in load_study(tmp_path / "tuning.yaml", ["seeds=[1]"])]
    assert [config.objective.beta.init for config in tuning] == list(base.betas.values())
    assert {config.data.eval for config in tuning} == {"runs/tiny_verbose/data/tuning.jsonl"}


def test_gains_are_paired_by_seed_and_the_best_choice_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = {("k2", "short"): (0.5, 0.6), ("k2", "long"): (0.55, 0.67), ("k3", "short"): (0.7, 0.4), ("k3", "long"): (0.6,)}
    (folder / "sharing.yaml").write_text(
        SHARING.replace("}\n  length", ", k3: [objective=kdrl, objective.kd.estimator=k3]}\n  length")
    )
    for run in load_study(folder / "sharing.yaml"):
        if run.seed <= len(accuracy[run.setting]):
            with MetricsLog(run.directory) as log:
                log.write(run.steps, {"eval/accuracy": accuracy[run.setting][run.seed - 1]})
    arguments = ["sharing.yaml", "--collect", "--against", "length=short", "--best", "length"]
    assert experiments.main(arguments) == 1  # a run is missing
    written = (folder / "runs" / "sharing_against_short.md").read_text().splitlines()
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in written[2:])
    p = ttest_rel(accuracy["k2", "long"], accuracy["k2", "short"]).pvalue
    assert first == ["k2", "long", "2", f"6.0% ± {12.706 * 0.01:.1%}", f"{p:.2g}", f"{p:.2g}"]
    assert second == ["k3", "long", "1", "-10.0%", "-", "-"]
    best = OmegaConf.load(folder / "runs" / "sharing_best.yaml")
    assert best == {"k2": "long", "k3": "short"}  # the one seed of k3 with the other length does not compete
    capsys.readouterr()
    for wrong, said in (("width=short", "no axis 'width'; its axes are: estimator, length"), ("length=x", "no choice 'x'")):
        assert experiments.main(["sharing.yaml", "--collect", "--against", wrong]) == 2
        assert said in capsys.readouterr().err


def test_holms_correction_and_degenerate_differences() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired_p([0.1, 0.1]) == 0.0 and paired_p([0.0, 0.0]) == 1.0 and paired_p([0.1]) is None
