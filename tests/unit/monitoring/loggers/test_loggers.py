"""Metrics reach every logger once, under the right run, whatever the services do; no logger delays training."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdrl_mcore.config import LoggingConfig, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.monitoring.loggers import following, processes
from kdrl_mcore.monitoring.loggers.choice import check_logger_packages, chosen
from kdrl_mcore.monitoring.loggers.following import Follower, default_name
from kdrl_mcore.monitoring.loggers.mlflow import name_of
from kdrl_mcore.monitoring.loggers.processes import RunLoggers
from kdrl_mcore.monitoring.metrics import METRICS_FILE
from kdrl_mcore.run_directory.branches import begin_branch
from tests.support import ROOT
from tests.support.logged_runs import RECORDED, follow, new_run, twice, write
from tests.support.recorded_logger import BROKEN, recorded

STUCK = "tests.support.recorded_logger:StuckLogger"
DYING = "tests.support.recorded_logger:DyingLogger"


def steps_of(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["reward"]) for row in recorded(run_dir) if "step" in row]


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Which loggers


def test_the_list_and_the_older_key_agree() -> None:
    assert chosen(LoggingConfig()) == ["tensorboard"]
    assert chosen(load_config(["objective=grpo", "logging.tensorboard=false"]).logging) == []
    assert chosen(load_config(["objective=grpo", "logging.tensorboard=true"]).logging) == ["tensorboard"]
    assert chosen(load_config(["objective=grpo", "logging.loggers=[wandb,mlflow]"]).logging) == ["wandb", "mlflow"]
    both = load_config(["objective=grpo", "logging.loggers=[wandb]", "logging.tensorboard=true"])
    assert chosen(both.logging) == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("loggers", "said"),
    [("[wanddb]", "wanddb is not one of: .*did you mean 'wandb'"), ("[wandb,wandb]", "twice"), ("wandb", r"\[wandb\]")],
)
def test_what_is_no_logger_is_refused(loggers: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(["objective=grpo", f"logging.loggers={loggers}"])


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr("kdrl_mcore.monitoring.loggers.choice.find_spec", nothing)
    with pytest.raises(ConfigError, match="mlflow is not installed: pip install mlflow-skinny"):
        check_logger_packages(LoggingConfig(loggers=["mlflow"]))
    with pytest.raises(ConfigError, match=r"no\.where:Logger is not installed: put no\.where on the PYTHONPATH"):
        check_logger_packages(LoggingConfig(loggers=["no.where:Logger"]))
    monkeypatch.undo()
    (tmp_path / "some_folder").mkdir()  # as W&B leaves one
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not installed"):
        check_logger_packages(LoggingConfig(loggers=["some_folder:Logger"]))
    assert check_logger_packages(LoggingConfig(loggers=["tensorboard", RECORDED])) == ["tensorboard", RECORDED]


@pytest.mark.parametrize(
    ("run_dir", "name"),
    [("runs/mine", "mine"), ("/scratch/runs/study/kdrl/seed_1", "study/kdrl/seed_1"), ("/scratch/me/a", "a"), ("runs", "runs")],
)
def test_a_run_is_called_as_its_folder_below_runs(run_dir: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert default_name(Path(run_dir)) == name


def test_names_of_metrics_as_mlflow_takes_them() -> None:
    assert [name_of(name) for name in ("eval/pass@4", "time/step", "reward/naïve?")] == [
        "eval/pass_at_4",
        "time/step",
        "reward/naïve_",
    ]


# Following a run


def test_a_run_that_resumes_continues_the_same_run_and_no_step_is_logged_twice(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "logging.project=maths", "logging.run_name=first try")
    write(run, 0, 1, 2, 3, 4)
    assert follow(run, failed=True) == []
    write(run, 3, 4, 5, after=2, reward=0.9)  # steps 3 and 4 were after the checkpoint
    assert follow(run, step=2) == []
    opens = [row for row in recorded(run) if "opens" in row]
    assert [(row["opens"], row["project"], row["after"]) for row in opens] == [
        ("first try", "maths", 0),
        ("first try", "maths", 2),
    ]
    assert opens[0]["resumes"] is None and opens[1]["resumes"] == opens[0]["id"]
    assert steps_of(run) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.9)]
    assert [row["closes"] for row in recorded(run) if "closes" in row] == ["failed", "well"]


def test_a_service_that_was_away_gets_what_it_missed_and_is_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path)
    warnings: list[str] = []
    follower = Follower(run, RECORDED, 0, warnings.append)
    write(run, 1)
    assert follower.send()
    (run / BROKEN).touch()
    write(run, 2)
    assert not follower.send()
    write(run, 3)
    assert not follower.send() and not follower.send(now=True)
    (line,) = warnings
    assert "ConnectionError: nobody answers at port 1" in line and "\n" not in line and f"loggers {run} {RECORDED}" in line
    (run / BROKEN).unlink()
    assert not follower.send()  # not before its time
    monkeypatch.setattr(following, "RETRY_SECONDS", 0.0)
    assert follower.send()
    assert follower.close(failed=False)
    assert [step for step, _ in steps_of(run)] == [1, 2, 3]
    assert len({row["id"] for row in recorded(run) if "opens" in row}) == 1


def test_another_branch_is_another_run_that_begins_with_the_steps_they_share(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write(run, 1, 2, 3, 4)
    follow(run)
    begin_branch(run, left="", shared=2, source="", step=2)
    write(run, 3, after=2, reward=0.9)
    follow(run, step=2)
    first, second = (row["id"] for row in recorded(run) if "opens" in row)
    assert first != second
    assert [step for step, _ in steps_of(run)] == [1, 2, 3, 4, 1, 2, 3]


def test_a_line_that_is_being_written_is_logged_when_it_is_whole(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    follower = Follower(run, RECORDED, 0, pytest.fail)
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 1, "reward": 0.1}\n{"step": 2, "rew')
        file.flush()
        assert follower.send()
        file.write('ard": "NaN"}\n')
    assert follower.send() and follower.close(failed=False)
    (_, first), (step, second) = steps_of(run)
    assert first == 0.1 and step == 2 and math.isnan(second)


# In separate processes


def test_a_service_is_followed_in_a_process_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path)
    loggers = RunLoggers(run, [RECORDED], 0)
    write(run, 1)
    loggers.update()
    wait_until(lambda: (run / "recorded.jsonl").exists() and steps_of(run) == [(1, 0.1)])
    write(run, 2)
    loggers.close(failed=False)
    assert steps_of(run) == [(1, 0.1), (2, 0.2)] and recorded(run)[-1] == {"closes": "well"}
    assert "tests.support.recorded_logger" not in sys.modules or not hasattr(
        sys.modules["tests.support.recorded_logger"], "opened"
    )
    assert not caplog.records


def test_a_service_that_never_answers_and_one_that_dies_cost_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(tmp_path)
    began = time.monotonic()
    loggers = RunLoggers(run, [STUCK, DYING], 0)
    for step in range(1, 20):
        write(run, step)
        loggers.update()
    assert time.monotonic() - began < 1.0
    wait_until(lambda: "DyingLogger" in caplog.text or loggers.update() or False)
    monkeypatch.setattr(processes, "CLOSE_SECONDS", 0.3)
    loggers.close(failed=False)
    assert len((run / METRICS_FILE).read_text().splitlines()) == 19
    dying, stuck = (record.getMessage() for record in caplog.records)
    assert DYING in dying and "exit code 3" in dying
    assert STUCK in stuck and "did not accept all metrics" in stuck and f"loggers {run} {STUCK}" in stuck


TRAINING = """
import sys, time
from pathlib import Path
from kdrl_mcore.monitoring.loggers.processes import RunLoggers
loggers = RunLoggers(Path(sys.argv[1]), [sys.argv[2]], 0)
time.sleep(100)
"""


def test_a_training_that_is_killed_has_its_run_closed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write(run, 1)
    training = subprocess.Popen([sys.executable, "-c", TRAINING, str(run), RECORDED], cwd=ROOT)
    try:
        wait_until(lambda: (run / "recorded.jsonl").exists() and bool(steps_of(run)))
        write(run, 2)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    wait_until(lambda: recorded(run)[-1] == {"closes": "failed"})
    assert steps_of(run) == [(1, 0.1), (2, 0.2)]


def command(run: Path, name: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "kdrl_mcore.monitoring.loggers", str(run), name]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)


def test_by_hand_what_is_missing_is_sent(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write(run, 1, 2)
    follow(run)
    write(run, 3)
    done = command(run, RECORDED)
    assert (done.returncode, done.stdout) == (0, f"{RECORDED} has every step of {run / METRICS_FILE}\n")
    assert [step for step, _ in steps_of(run)] == [1, 2, 3]


# In training


def train_on_rank(overrides: Sequence[str]) -> int:
    from kdrl_mcore.cli.train import main

    return main(list(overrides))


def test_a_training_run_and_its_resumption_are_one_run(zoo: Any, ranks1: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = [
        *("objective=sft", "trainer.self_test=false", "logging.progress=false", "checkpoint.export_hf=false"),
        *(f"student.path={zoo.model('untied')}", f"run.dir={run}", f"logging.loggers=[tensorboard,{RECORDED!r}]"),
        *("data.template=plain", f"data.train={tmp_path / 'data.jsonl'}", "rollout.prompts_per_step=2"),
    ]
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "response": str(i + 1)} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ranks1.run(train_on_rank, [*common, "trainer.steps=2"]) == [0]
    assert ranks1.run(train_on_rank, [*common, "trainer.steps=3"]) == [0]
    told = recorded(run)
    assert [row.get("step", "-") for row in told] == ["-", 1, 2, "-", "-", 3, "-"]
    assert told[0]["opens"] == "run" and told[4]["resumes"] == told[0]["id"] and told[4]["after"] == 2
    assert any((run / "tensorboard").iterdir())


# Real services, on this machine


def test_tensorboard_shows_the_steps_after_a_checkpoint_as_they_were_last(tmp_path: Path) -> None:
    def shown() -> list[tuple[int, float]]:
        events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("reward")
        return [(event.step, pytest.approx(event.value)) for event in events]

    run = new_run(tmp_path)
    twice(run, "tensorboard")
    assert shown() == [(1, 0.5), (2, 0.25), (3, 0.25)]
    begin_branch(run, left="", shared=2, source="", step=2)
    write(run, 3, after=2, reward=0.75)
    follow(run, "tensorboard", step=2)  # its folder has been moved away: everything is logged again
    assert shown() == [(1, 0.5), (2, 0.25), (3, 0.75)]


def test_wandb_gets_the_steps_that_its_server_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        id, resumed, offline, step = "w1", False, False, 0

        def log(self, metrics: dict[str, float], step: int) -> None:
            steps.append(step)

        def finish(self, exit_code: int) -> None:
            ended.append(exit_code)

    class Wandb:
        @staticmethod
        def Settings(**settings: Any) -> dict[str, Any]:
            return settings

        @staticmethod
        def init(**given: Any) -> Run:
            opened.append((given["project"], given["name"], given["id"], given["resume"]))
            return made

    opened, steps, ended, made = list[Any](), list[int](), list[int](), Run()
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run = new_run(tmp_path / "runs" / "a")
    write(run, 1, 2, 3, 4)
    follow(run, "wandb", failed=True)
    made.resumed, made.step = True, 3  # the process was killed before steps 3 and 4 were sent
    write(run, 5)
    follow(run, "wandb")
    assert opened == [("kdrl", "a", None, "allow"), ("kdrl", "a", "w1", "allow")]
    assert steps == [1, 2, 3, 4, 3, 4, 5] and ended == [1, 0]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (pip install 'kdrl-mcore[loggers]')")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = new_run(tmp_path / "runs" / "a", "logging.project=maths")
    twice(run, "mlflow")
    client = MlflowClient((run / "loggers" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("maths")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("a", "FINISHED")
    assert found.data.params["objective.alpha.init"] == "1.0"
    history = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "reward")]
    assert history == [(1, 0.5), (2, math.inf), (3, 0.25)]
    assert math.isnan(client.get_metric_history(found.info.run_id, "eval/pass_at_4")[0].value)
    client.delete_run(found.info.run_id)
    follow(run, "mlflow", step=3)  # somebody deleted the run: a new one has all steps
    (again,) = client.search_runs([experiment.experiment_id])
    assert [metric.step for metric in client.get_metric_history(again.info.run_id, "reward")] == [1, 2, 3]


def test_mlflow_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (pip install 'kdrl-mcore[loggers]')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = new_run(tmp_path)
    write(run, 1)
    follower = Follower(run, "mlflow", 0, (warnings := list[str]()).append)
    assert not follower.send() and "mlflow accepts no metrics" in warnings[0] and "\n" not in warnings[0]


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'kdrl-mcore[loggers]')")
    run = new_run(tmp_path / "runs" / "a", "logging.project=maths")
    script = (
        "import sys; from pathlib import Path; from tests.support.logged_runs import twice; twice(Path(sys.argv[1]), 'wandb')"
    )
    environment = os.environ | {"WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", script, str(run)], check=True, env=environment, cwd=ROOT)
    folders = sorted((run / "loggers" / "wandb").glob("offline-run-*"))
    ids = {re.sub(r".*-", "", folder.name) for folder in folders}
    assert len(folders) == 2 and ids == {json.loads((run / "loggers" / "wandb.json").read_text())["run_id"]}
    assert [wandb_steps(folder) for folder in folders] == [[1, 2], [1, 2, 3]]  # the last one has the whole run


def wandb_steps(folder: Path) -> list[int]:
    """The steps in the file that `wandb sync` uploads: a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, at, steps, data = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        length, part = struct.unpack("<HB", content[at + 4 : at + 7])
        data, at = data + content[at + 7 : at + 7 + length], at + 7 + length
        if part in (1, 4):  # the whole record, or its last part
            record, data = Record.FromString(data), b""
            steps += [record.history.step.num] if record.HasField("history") else []
        if -at % 32768 < 7:
            at += -at % 32768
    return steps


def test_trackio_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed (pip install 'kdrl-mcore[loggers]')")
    run = new_run(tmp_path / "runs" / "a", "logging.project=maths")
    script = (
        "import sys; from pathlib import Path; from tests.support.logged_runs import *; "
        "other = new_run(Path(sys.argv[1]).parent.parent / 'elsewhere' / 'runs' / 'a', 'logging.project=maths'); "
        "write(other, 1); twice(Path(sys.argv[1]), 'trackio'); follow(other, 'trackio')"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, str(run)], check=True, env=environment, cwd=ROOT)
    with sqlite3.connect(tmp_path / "trackio" / "maths.db") as database:
        rows = database.execute("select run_name, run_id, step from metrics order by id").fetchall()
    own = json.loads((run / "loggers" / "trackio.json").read_text())["run_id"]
    assert [(name, step) for name, run_id, step in rows if run_id == own] == [("a", 1), ("a", 2), ("a", 3)]
    assert [(name, step) for name, run_id, step in rows if run_id != own] == [("a", 1)]
