"""`sbatch slurm/kdrl_32b.sh` on a real SLURM: the actual script of the 32B job, here with the tiny experiment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kdrl_mcore.monitoring.metrics import read_metrics
from tests.reference.tiny_models import read_jsonl
from tests.support import ROOT
from tests.support.slurm_cluster import Cluster, needs_slurm
from tests.support.slurm_jobs import steps_done
from tests.support.vllm_models import make_student, needs_vllm

STEPS = 40

pytestmark = [needs_slurm, pytest.mark.timeout(900)]


def submit(cluster: Cluster, folder: Path, overrides: list[str], *options: str, **settings: str) -> str:
    """Submit the script from a separate folder; returns the job's number."""
    variables = {"KDRL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings}
    script = str(ROOT / "slurm" / "kdrl_32b.sh")
    return cluster.run("sbatch", "--parsable", *options, script, *overrides, cwd=folder, **variables).strip()


def job_log(folder: Path, number: str) -> str:
    """The output of the job's script."""
    return (folder / f"kdrl_32b-{number}.log").read_text()


def train_log(run_dir: Path, number: str, start: int) -> str:
    """The first node's output of one start of a job."""
    return (run_dir / "logs" / f"{number}-{start}" / "train-node0.log").read_text()


def stopped_after(run_dir: Path, number: str, start: int) -> int:
    """The step after which a start of a job ended on request."""
    found = re.search(r"stopped on .* after step (\d+)", train_log(run_dir, number, start))
    assert found is not None, train_log(run_dir, number, start)
    return int(found.group(1))


def test_a_job_grows_to_its_nodes_is_preempted_warned_of_its_time_limit_and_finishes(
    cluster: Cluster, tiny_job: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    layout = ["cluster.nodes=2", "cluster.gpus_per_node=1", "parallel.tensor=2"]
    unhurried = ["fault.kind=slow", "fault.seconds=0.25"]  # so that the job does not end before it is preempted
    overrides = [*tiny_job, *layout, *unhurried, f"run.dir={run_dir}", f"trainer.steps={STEPS}", "checkpoint.every=5"]
    number = submit(cluster, tmp_path, overrides, "--time=59", KDRL_PREFLIGHT="0")

    cluster.start_again(number, restarts=1)  # it was submitted for one node and asked for a second one
    assert "needs 2 nodes" in job_log(tmp_path, number)
    cluster.wait_in_job(number, lambda: len(steps_done(run_dir)) >= 3, "three steps")
    assert cluster.job(number)["NumNodes"] == "2"
    cluster.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=2", "--wrap=true", cwd=tmp_path)

    cluster.run("scontrol", "update", f"jobid={number}", "timelimit=UNLIMITED")
    cluster.start_again(number, restarts=2)
    first = stopped_after(run_dir, number, 1)
    cluster.wait_in_job(number, lambda: steps_done(run_dir)[-1] >= first + 2, "two more steps")
    cluster.run("scancel", "--batch", "--signal=USR1", number)  # what SLURM sends before the time limit

    cluster.start_again(number, restarts=3)
    second = stopped_after(run_dir, number, 2)
    assert cluster.end_of(number) == "COMPLETED"
    assert first >= 3 and first + 2 <= second < STEPS
    for start, step in ((2, first), (3, second)):
        assert f"resumed from {run_dir}/checkpoints/step_{step:06d} after step {step}" in train_log(run_dir, number, start)
    assert cluster.job(number)["Restarts"] == "3"
    assert steps_done(run_dir) == list(range(1, STEPS + 1))
    assert (run_dir / "hf" / "model.safetensors").is_file()
    logs = sorted(path.relative_to(run_dir / "logs").as_posix() for path in (run_dir / "logs").glob("*/*.log"))
    assert logs == [f"{number}-{start}/train-node{node}.log" for start in (1, 2, 3) for node in (0, 1)]


def test_preflight_and_one_task_per_gpu_on_the_nodes_that_sbatch_was_asked_for(
    cluster: Cluster, tiny_job: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_job, "parallel.tensor=2", f"run.dir={tmp_path}/run", "trainer.steps=2"]
    number = submit(cluster, tmp_path, overrides, "--nodes=1", KDRL_LAUNCHER="srun")
    assert cluster.end_of(number) == "COMPLETED", job_log(tmp_path, number)
    assert steps_done(tmp_path / "run") == [1, 2]
    report = (tmp_path / "run" / "logs" / f"{number}-0" / "preflight-node0.log").read_text()
    assert re.findall(r"^ok +(\S+)", report, re.MULTILINE) == [
        *(
            "versions",
            "devices",
            "hub",
            "models",
            "layout",
            "engines",
            "teachers",
            "data",
            "lengths",
            "memory",
            "loggers",
            "run.dir",
        ),
        "all-reduce",
    ]


SERVER = """import json, os, sys, time
run_dir, index, host = sys.argv[-5], sys.argv[-3], sys.argv[-1]
address = os.path.join(run_dir, "servers", index + ".json")
os.makedirs(os.path.dirname(address), exist_ok=True)
json.dump({"address": host, "pid": os.getpid(), "arguments": sys.argv[1:-6]}, open(address, "w"))
history = open(os.path.join(run_dir, "served"), "a")
print(os.getpid(), file=history, flush=True)
time.sleep(10**6 if "SLURM_RESTART_COUNT" in os.environ else 0.5)
"""
"""Stands in for an engine server: it ends by itself in the job's first start."""


def test_a_job_whose_rank_was_killed_is_queued_again_while_it_gets_further_and_its_server_node_serves(
    cluster: Cluster, tiny_job: list[str], tmp_path: Path
) -> None:
    """The job is killed in step 4: the first start saves step 3 and is requeued; the second gets no further and fails. The
    request to begin anew applies to the first start only."""
    run_dir = tmp_path / "run"
    (tmp_path / "server.py").write_text(SERVER)
    fault = ["fault.kind=kill", "fault.step=4", "fault.phase=reward"]
    overrides = [*tiny_job, *fault, f"run.dir={run_dir}", "checkpoint.every=3", "checkpoint.asynchronous=false"]
    overrides += ["checkpoint.resume=never"]
    serving = {"KDRL_SERVER_COMMAND": f"{sys.executable} {tmp_path}/server.py", "KDRL_SERVER_PAUSE": "0.2"}
    nodes = ["cluster.server_nodes=1", "cluster.gpus_per_node=1"]
    number = submit(cluster, tmp_path, [*overrides, *nodes], "--nodes=2", KDRL_PREFLIGHT="0", **serving)
    cluster.start_again(number, restarts=1)
    assert f"train ended with exit code 1 after saving step_000003: job {number} goes back" in job_log(tmp_path, number)
    (log,) = (run_dir / "logs" / f"{number}-0").glob("servers-*.log")
    assert "server 0 on 127.0.0.1 ended with exit code 0: it is started again" in log.read_text()
    assert cluster.end_of(number) == "FAILED"
    assert cluster.job(number)["Restarts"] == "1"
    assert f"resumed from {run_dir}/checkpoints/step_000003 after step 3" in train_log(run_dir, number, 1)
    assert steps_done(run_dir) == [1, 2, 3]
    pids = [int(pid) for pid in (run_dir / "served").read_text().split()]
    assert len(pids) >= 3
    cluster.wait(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the servers to end", 60)


@needs_vllm
def test_a_node_trains_and_another_one_serves_real_vllm(cluster: Cluster, tiny_job: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    models = [f"{name}.path={make_student(tmp_path / name, seed)}" for name, seed in (("student", 1), ("teacher", 2))]
    vllm = ["rollout=vllm", "rollout.vllm.kv_cache_gib=0.1", "cluster.server_nodes=1", "cluster.gpus_per_node=1"]
    overrides = [*tiny_job, *models, *vllm, f"run.dir={run_dir}", "trainer.steps=2", "checkpoint.every=-1"]
    number = submit(cluster, tmp_path, overrides, "--nodes=2", KDRL_PREFLIGHT="0")
    assert cluster.end_of(number) == "COMPLETED", job_log(tmp_path, number)
    assert cluster.job(number)["Restarts"] == "0"
    metrics = list(read_metrics(run_dir))
    assert [row["step"] for row in metrics] == [1, 2] and all(row["drift_max"] < 1e-3 for row in metrics)
    for step in (1, 2):
        lines = read_jsonl(run_dir / "rollouts" / f"step_{step:06d}.jsonl")
        assert lines and {line["weight_version"] for line in lines} == {step - 1}
    (log,) = (run_dir / "logs" / f"{number}-0").glob("servers-*.log")
    assert "it is started again" not in log.read_text()
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    assert not [command for command in commands if str(run_dir) in command]


def test_a_node_trains_and_another_one_serves_the_teacher(cluster: Cluster, tiny_job: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    served = ["teacher.server.kind=hidden_states", "objective.kd.estimator=exact", "cluster.teacher_nodes=1"]
    served += ["rollout.max_prompt_tokens=64"]
    overrides = [*tiny_job, *served, "cluster.gpus_per_node=1", f"run.dir={run_dir}", "trainer.steps=2", "checkpoint.every=-1"]
    number = submit(cluster, tmp_path, overrides, "--nodes=2", KDRL_PREFLIGHT="0")
    assert cluster.end_of(number) == "COMPLETED", job_log(tmp_path, number)
    assert all(row["kl_full"] > 0 for row in read_metrics(run_dir)) and steps_done(run_dir) == [1, 2]
    (log,) = (run_dir / "logs" / f"{number}-0").glob("teacher-teacher-*.log")
    assert "is served at http://127.0.0.1:" in log.read_text() and "it is started again" not in log.read_text()
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    assert not [command for command in commands if str(run_dir) in command]


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, tiny_job: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_job, f"run.dir={tmp_path}/run", "trainer.steps=2000"]
    number = submit(cluster, tmp_path, overrides, KDRL_PREFLIGHT="0")
    cluster.wait_in_job(number, lambda: len(steps_done(tmp_path / "run")) >= 2, "two steps")
    cluster.run("scancel", number)
    cluster.wait(lambda: cluster.state(number) == "CANCELLED", "the end", 60)

    def saved() -> bool:
        """A cancelled job still completes its current step, so the last step is looked up each time."""
        last = steps_done(tmp_path / "run")[-1]
        return (tmp_path / "run" / "checkpoints" / f"step_{last:06d}" / "manifest.json").is_file()

    cluster.wait(saved, "the checkpoint of the last step", 100)


def test_what_is_wrong_is_told_in_one_line_before_anything_trains(
    cluster: Cluster, tiny_job: list[str], tmp_path: Path
) -> None:
    unknown = submit(cluster, tmp_path, [*tiny_job, f"run.dir={tmp_path}/run", "trainer.step=5"])
    absent = submit(cluster, tmp_path, [*tiny_job, f"run.dir={tmp_path}/run", "data.train=absent.jsonl"])
    for number in (unknown, absent):
        assert cluster.end_of(number) == "FAILED"
        assert cluster.job(number)["Restarts"] == "0"
    assert "error: unknown configuration key 'trainer.step'; did you mean 'trainer.steps'?" in job_log(tmp_path, unknown)
    assert "error: preflight, data: absent.jsonl is not on" in job_log(tmp_path, absent)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_outside_slurm_the_script_says_how_to_submit_it() -> None:
    bash = shutil.which("bash")
    assert bash is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([bash, "slurm/kdrl_70b.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: this script is a SLURM job: sbatch slurm/kdrl_70b.sh [key=value ...]\n"
