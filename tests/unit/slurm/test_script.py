"""What the job's script requests from srun, without SLURM: in a container, and after the job was requeued."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.slurm_script import ONE_SERVER, submit


def test_every_step_runs_in_the_container(tmp_path: Path) -> None:
    read, preflight, train = submit(tmp_path, "teacher.path=/models/t", KDRL_MOUNTS="/models:/models", KDRL_MIN_BANDWIDTH="50")
    for call in (read, preflight, train):
        assert "--container-image=/images/kdrl.sqsh " in call
        assert f"--container-mounts={ROOT}:{ROOT},/models:/models " in call and f"--container-workdir={ROOT} " in call
        assert " experiment=kdrl_70b teacher.path=/models/t" in call
    assert f" python3 {ROOT}/slurm/settings.py " in read
    assert " kdrl_mcore.preflight --min-bandwidth 50 " in preflight and " kdrl_mcore.train " in train
    for call in (preflight, train):
        assert " --nodes=2 --ntasks=2 " in call and call.endswith(" cluster.nodes=2 cluster.gpus_per_node=8")


@pytest.mark.parametrize(
    ("settings", "image", "python"),
    [
        ({}, "/images/kdrl.sqsh", "python3"),
        ({"KDRL_SERVER_PYTHON": "/envs/vllm/bin/python"}, "/images/kdrl.sqsh", "/envs/vllm/bin/python"),
        ({"KDRL_SERVER_CONTAINER": "/images/vllm.sqsh"}, "/images/vllm.sqsh", "python3"),
    ],
    ids=["as training", "their own Python", "their own container"],
)
def test_servers_may_have_an_environment_of_their_own(
    settings: dict[str, str], image: str, python: str, tmp_path: Path
) -> None:
    calls = submit(tmp_path, KDRL_PREFLIGHT="0", SLURM_JOB_NUM_NODES="3", SERVERS=ONE_SERVER, **settings)
    (servers,) = [call for call in calls if "slurm/serve.sh" in call]
    (train,) = [call for call in calls if "slurm/task.sh" in call]
    assert f"--container-image={image} " in servers and "--container-image=/images/kdrl.sqsh " in train
    assert servers.endswith(f" bash {ROOT}/slurm/serve.sh {python} -m kdrl_mcore.rollout.vllm.server --x")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_one_task_per_node_or_per_gpu(launcher: str, tmp_path: Path) -> None:
    _, train = submit(tmp_path, KDRL_LAUNCHER=launcher, KDRL_PREFLIGHT="0")
    tasks = {"torchrun": (2, 1), "srun": (16, 8)}[launcher]
    assert " --nodes=2 --ntasks={} --ntasks-per-node={} ".format(*tasks) in train


def test_where_a_job_begins_counts_until_it_has_saved(tmp_path: Path) -> None:
    """checkpoint.resume names where the job begins; a start after the job's first checkpoint resumes from the latest one."""
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
