"""A task of a SLURM step (slurm/task.sh) that gets a signal, and one on a node that does not fit, without SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT

RANK = """import os, signal
def stop(number, frame):
    open(os.environ["STOPPED"], "w").write(signal.Signals(number).name)
    os._exit(0)
signal.signal(signal.SIGUSR1, stop)
open(os.environ["READY"], "w").close()
while True:
    signal.pause()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of the only task of a step, whose rank waits for SIGUSR1."""
    (tmp_path / "waiting_rank.py").write_text(RANK)
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}
    job |= {
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "KDRL_PYTHON": sys.executable,
    }
    job |= {"KDRL_WORK_DIR": str(tmp_path), "KDRL_LOG_DIR": str(tmp_path), "KDRL_GPUS": "0", "KDRL_RANKS_PER_NODE": "1"}
    job |= {"PYTHONPATH": str(tmp_path), "READY": f"{tmp_path}/ready", "STOPPED": f"{tmp_path}/stopped"}
    return os.environ | job | {"KDRL_LAUNCHER": "srun"}


@pytest.mark.parametrize(("launcher", "number"), [("srun", "USR1"), ("srun", "INT"), ("torchrun", "USR2")])
def test_a_step_that_is_signalled_ends_well_whatever_the_signal(
    launcher: str, number: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """SLURM signals every process of the step at once, so the rank may end while the task's shell gets its signal."""
    for _ in range(4 if launcher == "srun" else 1):
        for name in ("ready", "stopped", "asked-to-stop"):
            (tmp_path / name).unlink(missing_ok=True)
        command = [
            "env",
            "--default-signal=INT",
            "bash",
            str(ROOT / "slurm" / "task.sh"),
            "waiting_rank",
        ]  # INT: for a background job of the shell
        task = subprocess.Popen(command, env=environment | {"KDRL_LAUNCHER": launcher}, start_new_session=True)
        try:
            while not (tmp_path / "ready").exists():
                assert task.poll() is None
                time.sleep(0.02)
            os.killpg(task.pid, signal.Signals[f"SIG{number}"])
            assert task.wait(60) == 0
        finally:
            if task.poll() is None:
                for process in (*psutil.Process(task.pid).children(recursive=True), task):  # a rank leads its own session
                    process.kill()
        assert (tmp_path / "stopped").read_text() == "SIGUSR1"
        assert (tmp_path / "asked-to-stop").exists()


def test_the_ranks_exit_code_is_the_tasks(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "waiting_rank.py").write_text("import os, sys\nassert 'TMPDIR' not in os.environ\nsys.exit(75)\n")
    command = ["bash", str(ROOT / "slurm" / "task.sh"), "waiting_rank"]
    done = subprocess.run(command, env=environment | {"TMPDIR": "/no/such/folder"}, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert not (tmp_path / "asked-to-stop").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KDRL_WORK_DIR": "/no/such/folder"}, "error: /no/such/folder is not on "),
        (
            {"KDRL_GPUS": "8", "KDRL_RANKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "5"},
            "shows 1 GPUs for 2 ranks, CUDA_VISIBLE_DEVICES=5",
        ),
        ({"KDRL_GPUS": "8", "CUDA_VISIBLE_DEVICES": ""}, "shows 0 GPUs for 1 ranks, CUDA_VISIBLE_DEVICES=: "),
    ],
    ids=["folder", "fewer GPUs", "no GPU"],
)
def test_a_node_that_does_not_fit_is_named(variables: dict[str, str], message: str, environment: dict[str, str]) -> None:
    command = ["bash", str(ROOT / "slurm" / "task.sh"), "waiting_rank"]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
