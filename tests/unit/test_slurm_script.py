"""What the job's script asks srun for, where no SLURM is: in a container, and when the job was requeued."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [[ $* == *slurm/settings.py* ]]; then
  echo "config_nodes=2 ${SERVERS:-server_nodes=0} ranks_per_node=8" | tr ' ' '\\n'
  echo "run_dir=$RUN"
  echo "server_overrides=()"
fi
"""
ONE_SERVER = "server_nodes=1 servers_per_node=1 server_gpus=8 server_arguments=--x"
SCONTROL = """#!/usr/bin/env bash
echo "NodeName=n3 NodeAddr=10.0.0.3 " # its `show nodes`; of `show hostnames` only the number of lines counts
"""


def submit(folder: Path, *overrides: str, **settings: str) -> list[str]:
    """Run the script on two nodes, with an srun that only notes down what it is called with; the calls."""
    (folder / "srun").write_text(SRUN)
    if not (folder / "scontrol").exists():
        (folder / "scontrol").write_text(SCONTROL)
    for tool in ("srun", "scontrol"):
        (folder / tool).chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "KDRL_ROOT": str(ROOT)}
    job |= {"CALLS": str(calls), "RUN": str(folder / "run"), "KDRL_CONTAINER": "/images/kdrl.sqsh", **settings}
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | job
    done = subprocess.run(
        ["bash", "slurm/kdrl_70b.sh", *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines()


def test_every_step_runs_in_the_container(tmp_path: Path) -> None:
    read, preflight, train = submit(tmp_path, "teacher.path=/models/t", KDRL_MOUNTS="/models:/models", KDRL_MIN_BANDWIDTH="50")
    for call in (read, preflight, train):
        assert "--container-image=/images/kdrl.sqsh " in call
        assert f"--container-mounts={ROOT}:{ROOT},/models:/models " in call and f"--container-workdir={ROOT} " in call
        assert " experiment=kdrl_70b teacher.path=/models/t" in call
    assert " python3 slurm/settings.py " in read
    assert " kdrl_mcore.preflight --min-bandwidth 50 " in preflight and " kdrl_mcore.train " in train
    for call in (preflight, train):
        assert call.startswith("--nodes=2 --ntasks=2 ") and call.endswith(" cluster.nodes=2 cluster.gpus_per_node=8")


@pytest.mark.parametrize(
    ("settings", "image", "python"),
    [
        ({}, "/images/kdrl.sqsh", "python3"),
        ({"KDRL_SERVER_PYTHON": "/envs/vllm/bin/python"}, "/images/kdrl.sqsh", "/envs/vllm/bin/python"),
        ({"KDRL_SERVER_CONTAINER": "/images/vllm.sqsh"}, "/images/vllm.sqsh", "python3"),
    ],
    ids=["as training", "a Python of their own", "a container of their own"],
)
def test_servers_may_have_an_environment_of_their_own(
    settings: dict[str, str], image: str, python: str, tmp_path: Path
) -> None:
    calls = submit(tmp_path, KDRL_PREFLIGHT="0", SLURM_JOB_NUM_NODES="3", SERVERS=ONE_SERVER, **settings)
    (servers,) = [call for call in calls if "slurm/serve.sh" in call]
    (train,) = [call for call in calls if "slurm/task.sh" in call]
    assert f"--container-image={image} " in servers and "--container-image=/images/kdrl.sqsh " in train
    assert servers.endswith(f" bash slurm/serve.sh {python} -m kdrl_mcore.rollout.vllm_server --x")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_one_task_per_node_or_per_gpu(launcher: str, tmp_path: Path) -> None:
    _, train = submit(tmp_path, KDRL_LAUNCHER=launcher, KDRL_PREFLIGHT="0")
    tasks = {"torchrun": (2, 1), "srun": (16, 8)}[launcher]
    assert train.startswith("--nodes=2 --ntasks={} --ntasks-per-node={} ".format(*tasks))


def test_where_a_job_begins_counts_until_it_has_saved(tmp_path: Path) -> None:
    """checkpoint.resume names the beginning; a start after the job's own first checkpoint goes on from the latest one."""
    settings = {"KDRL_PREFLIGHT": "0"}
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").symlink_to("step_000200")
    resume = f"checkpoint.resume={checkpoints}/step_000120"
    for _ in range(2):
        assert "checkpoint.resume=auto" not in submit(tmp_path, resume, **settings)[-1]
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_000130")
    assert submit(tmp_path, resume, **settings)[-1].endswith(" checkpoint.resume=auto")
    assert "checkpoint.resume=auto" not in submit(tmp_path, resume, SLURM_JOB_ID="8", **settings)[-1]
