"""The large jobs' scripts with the settings of sites and users, on a real SLURM and submitted from any folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.slurm_cluster import Cluster, needs_slurm
from tests.support.slurm_jobs import steps_done, tiny_job_on

pytestmark = [needs_slurm, pytest.mark.timeout(900)]

PYTHON = """#!/usr/bin/env bash
case $* in
  *kdrl_mcore.preflight*) exit 0 ;;
  *kdrl_mcore.train*) [[ -z ${{RECORDS:-}} ]] || exec {python} "{folder}/record.py" "$@" ;;
esac
export OMP_NUM_THREADS=1
exec {python} "$@"
"""
"""Skips the preflight; with RECORDS, each task records where it runs instead of training."""
RECORD = """import json, os, signal, sys
import kdrl_mcore
names = ("SLURMD_NODENAME", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LC_ALL", "PYTHONUTF8")
found = {name: os.environ.get(name) for name in names}
found |= {"words": sys.argv[1:], "folder": os.getcwd(), "module": kdrl_mcore.__file__}
file = os.path.join(os.environ["RECORDS"], "-".join((os.environ["SLURM_JOB_ID"], os.environ["SLURM_PROCID"])))
with open(file + ".part", "w") as out:
    json.dump(found, out)
os.rename(file + ".part", file)
if "trainer.steps=9999" in sys.argv:
    signal.signal(signal.SIGUSR1, lambda *_: (print("stopped on SIGUSR1 after step 1 of 9", flush=True), os._exit(0)))
    while True:
        signal.pause()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32B job's script in a checkout whose folder name has a blank, with its own environment."""
    checkout = tmp_path_factory.mktemp("opt") / "my tools"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    for name in ("kdrl_mcore", "conf"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "record.py").write_text(RECORD)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, folder=checkout))
    python.chmod(0o755)
    return checkout / "slurm" / "kdrl_32b.sh"


def test_a_job_without_the_users_environment_that_may_not_be_requeued(
    cluster: Cluster, pair: Path, script: Path, tmp_path: Path
) -> None:
    """The node is drained while the job trains, the job is suspended, only its steps are signalled, and salloc resumes the run;
    relative paths refer to the folder from which it was submitted."""
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "pair").symlink_to(pair)
    overrides = [*tiny_job_on("pair"), "run.dir=runs/one", "fault.kind=slow", "fault.seconds=0.2"]
    options = ["--export=NONE", "--no-requeue", "--job-name=my own", "--output=%x.log", "--nodelist=alpha"]
    number = cluster.run("sbatch", "--parsable", *options, str(script), *overrides, "trainer.steps=2000", cwd=folder).strip()
    run_dir, log = folder / "runs" / "one", folder / "my own.log"
    cluster.wait_in_job(number, lambda: len(steps_done(run_dir)) >= 2, "two steps")

    cluster.run("scontrol", "update", "nodename=alpha", "state=drain", "reason=test")
    cluster.run("scontrol", "suspend", number)
    assert cluster.state(number) == "SUSPENDED"
    cluster.run("scontrol", "resume", number)
    done = len(steps_done(run_dir))
    cluster.wait_in_job(number, lambda: len(steps_done(run_dir)) > done, "a step after it was suspended")
    for _ in range(3):  # slurmd loses a signal that arrives while it is still resuming the step
        cluster.run("scancel", "--signal=USR1", number)  # as --signal without B: sends it, to the steps only
        with suppress(TimeoutError):
            cluster.wait(lambda: cluster.state(number) != "RUNNING", "the end of its step", 60)
            break
    assert cluster.end_of(number) == "COMPLETED", log.read_text()
    cluster.run("scontrol", "update", "nodename=alpha", "state=resume")
    last = steps_done(run_dir)[-1]
    assert "train was asked to stop. The job does not go back to the queue, as it has --no-requeue" in log.read_text()
    assert f"submit the same command again, it resumes from step_{last:06d}\n" in log.read_text()
    assert "error" not in log.read_text() and "finished" not in log.read_text()

    command = ["salloc", "--nodes=1", "--exclusive", "bash", str(script), *overrides, f"trainer.steps={last + 1}"]
    done_by_hand = subprocess.run(
        command, cwd=folder, env=cluster.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400
    )
    assert done_by_hand.returncode == 0, done_by_hand.stderr
    assert done_by_hand.stdout.endswith(" finished\n")
    assert steps_done(run_dir) == list(range(1, last + 2))


def test_jobs_of_users_with_ways_of_their_own(cluster: Cluster, pair: Path, script: Path, tmp_path: Path) -> None:
    """Each job has one task per GPU, which only records where it runs."""
    records, folder, decoy = tmp_path / "records", tmp_path / "my work", tmp_path / "decoy"
    for each in (records, folder / "kdrl_mcore", decoy / "kdrl_mcore", tmp_path / "bin"):
        each.mkdir(parents=True)
    for each in (folder, decoy):  # another checkout, in the user's folder and in PYTHONPATH
        (each / "kdrl_mcore" / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nprintf %s \"$CUDA_VISIBLE_DEVICES\" | tr , '\\n'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    of_the_user = {"PATH": f"{tmp_path}/bin:{cluster.environment()['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(decoy)}
    of_the_user |= {"LC_ALL": "xx_XX", "CDPATH": "/usr:/", "TMPDIR": "/no/such/folder", "RANK": "5", "MASTER_ADDR": "10.9.9.9"}
    of_the_user |= {"SLURM_MPI_TYPE": "pmix_v9", "CONDA_PREFIX": "/opt/conda", "SQUEUE_STATES": "FAILED"}
    interactive = {
        "SLURM_GPUS_PER_TASK": "7",
        "SLURM_NTASKS_PER_GPU": "3",
        "SLURM_ARRAY_JOB_ID": "3",
        "SLURM_ARRAY_TASK_ID": "7",
    }
    interactive |= {"SLURM_RESTART_COUNT": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_CPU_BIND": "verbose"}
    settings = of_the_user | interactive | {"RECORDS": str(records), "KDRL_LAUNCHER": "srun"}
    job = [*tiny_job_on(str(pair)), "cluster.gpus_per_node=2"]

    def submit(*words: str) -> str:
        umask = ["bash", "-c", 'umask 077; exec "$@"', "_"]
        return cluster.run(*umask, "sbatch", "--parsable", "--output=%j.log", *words, cwd=folder, **settings).strip()

    def log(number: str) -> str:
        return (folder / f"{number}.log").read_text()

    def found(number: str) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted(records.glob(f"{number}-?"))]

    def start_of(task: str) -> str:
        return cluster.job(task)["Restarts"]

    each_gpu = submit("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", str(script), *job, "run.dir=runs/each gpu")
    unequal = submit("--nodes=2", str(script), *job, "run.dir=runs/unequal", "cluster.gpus_per_node=3")
    wrapped = submit("--ntasks-per-node=2", f"--wrap=bash '{script}' {' '.join(job)} run.dir=runs/wrapped")
    shared = submit("--array=0-1", str(script), *job, "run.dir=runs/shared")
    array = submit("--array=0-1", str(script), *job, "run.dir=~/runs/%a", "trainer.seed=%a", "trainer.steps=9999")

    assert cluster.end_of(each_gpu) == "COMPLETED", log(each_gpu)
    assert [(rank["SLURMD_NODENAME"], rank["CUDA_VISIBLE_DEVICES"], rank["RANK"]) for rank in found(each_gpu)] == [
        *(("alpha", "0,1", "0"), ("alpha", "0,1", "1"), ("beta", "0,1", "2"), ("beta", "0,1", "3"))
    ]
    assert cluster.end_of(wrapped) == "COMPLETED", log(wrapped)
    for rank in found(each_gpu) + found(wrapped):
        assert rank["folder"] == str(folder) and rank["module"] == f"{script.parents[1]}/kdrl_mcore/__init__.py"
        assert rank["LC_ALL"] == "xx_XX" and rank["PYTHONUTF8"] == "1"
    assert (folder / "runs" / "each gpu" / "logs" / f"{each_gpu}-0").stat().st_mode & 0o77 == 0
    assert cluster.end_of(unequal) == "FAILED"
    assert "error: beta has 2 GPUs for this job and cluster.gpus_per_node is 3: ask for them with sbatch" in log(unequal)
    assert {cluster.end_of(f"{shared}_{task}") for task in (0, 1)} == {"FAILED"}
    assert "error: the tasks of an array need separate run directories: run.dir=.../%a" in log(shared)
    assert "sbatch --array=0-1%1" in log(shared) and not (folder / "runs" / "shared").exists()

    cluster.wait(lambda: [cluster.state(f"{array}_{task}") for task in (0, 1)] == ["RUNNING"] * 2, "the array to start", 60)
    tasks = {cluster.job(f"{array}_{task}")["JobId"]: task for task in (0, 1)}
    cluster.wait(lambda: len([rank for number in tasks for rank in found(number)]) == 4, "both tasks of the array", 60)
    for number, task in tasks.items():
        assert {f"run.dir={tmp_path}/runs/{task}", f"trainer.seed={task}"} <= set(found(number)[0]["words"])
    # The array's last task has the array's number, by which SLURM would requeue the other one too. While held, it continues,
    # and it stays in the queue once it is there.
    last, other = (f"{array}_{task}" for task in (tasks[array], 1 - tasks[array]))
    cluster.run("scontrol", "hold", last)
    assert cluster.state(last) == "RUNNING"
    cluster.run("scancel", "--batch", "--signal=USR1", last)
    cluster.wait(lambda: start_of(last) == "1" and cluster.state(last) == "PENDING", "the task to go back to the queue", 240)
    assert cluster.job(last)["Priority"] == "0"
    assert (start_of(other), cluster.state(other)) == ("0", "RUNNING")
    cluster.run("scancel", array)
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), "the array to end", 60)
