"""The servers of the server nodes: how many there are, on which GPUs, and what of training's environment they do not get."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError
from tests.support import ROOT
from tests.support.slurm_script import submit

SCONTROL = """#!/usr/bin/env bash
case $2 in
  hostnames) printf 'n1\\nn2\\nn3\\n' ;;
  show) printf 'NodeName=n NodeAddr=10.0.0.3 \\n' ;;
esac
"""
SERVERS = "server_nodes=1 servers_per_node=4 server_gpus=2 server_arguments=--x"


@pytest.fixture(scope="module")
def settings() -> ModuleType:
    """slurm/settings.py, which is a program, as a module."""
    spec = importlib.util.spec_from_file_location("slurm_settings", ROOT / "slurm" / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("tensor", "gpus", "servers"), [(1, 8, 8), (4, 8, 2), (8, 8, 1), (3, 8, 2), (4, 0, 1)])
def test_engines_fill_a_server_node(tensor: int, gpus: int, servers: int, settings: ModuleType) -> None:
    config = load_config(["rollout=vllm", "objective=grpo", "cluster.server_nodes=2", f"rollout.vllm.tensor={tensor}"])
    assert settings.servers_per_node(config, gpus) == servers
    assert settings.server_overrides(config, servers)[1] == f"rollout.vllm.replicas={2 * servers}"


def test_an_engine_larger_than_a_server_node_is_refused(settings: ModuleType) -> None:
    config = load_config(["rollout=vllm", "objective=grpo", "cluster.server_nodes=2", "rollout.vllm.tensor=16"])
    with pytest.raises(ConfigError, match=r"rollout.vllm.tensor=16 does not fit a server node of 8 GPUs"):
        settings.servers_per_node(config, 8)


def test_the_job_starts_one_for_each(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    calls = submit(tmp_path, SLURM_JOB_NUM_NODES="3", KDRL_PREFLIGHT="0", SERVERS=SERVERS)
    (servers,) = [call for call in calls if "slurm/serve.sh" in call]
    assert " --nodes=1 --ntasks=4 --ntasks-per-node=4 --nodelist=n3 " in servers


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"), [("2", None, "4,5"), ("2", "7,6,5,4,3,2,1,0", "3,2"), ("0", None, "all")]
)
def test_a_server_has_its_share_of_the_gpus_and_nothing_of_training(
    gpus: str, visible: str | None, expected: str, tmp_path: Path
) -> None:
    """The third server of the second server node."""
    command = tmp_path / "server"
    command.write_text(
        f"""#!/usr/bin/env bash
cd {tmp_path}
settings="${{CUDA_VISIBLE_DEVICES-all}}|${{PYTORCH_CUDA_ALLOC_CONF-}}|${{PYTORCH_ALLOC_CONF-}}|${{!TORCH_NCCL_@}}"
echo "$settings|$2|${{*:3}}" >begun
mv begun started
exec sleep 60
"""
    )
    command.chmod(0o755)
    job = {"SLURM_PROCID": "6", "SLURM_NODEID": "1", "SLURM_LOCALID": "2", "KDRL_SERVER_HOSTS": "10.0.0.3 10.0.0.4"}
    job |= {"KDRL_SERVER_GPUS": gpus, "KDRL_RUN_DIR": str(tmp_path), "KDRL_LOG_DIR": str(tmp_path)}
    job |= {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"}
    job |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "nccl_rank_"}
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | job
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    server = subprocess.Popen(["bash", "slurm/serve.sh", f"{command} --model 'a model'"], cwd=ROOT, env=environment)
    try:
        while not (tmp_path / "started").exists():
            assert server.poll() is None
        devices, allocator, other, nccl, model, arguments = (tmp_path / "started").read_text().strip().split("|")
        assert (devices, allocator, other, nccl, model) == (expected, "max_split_size_mb:512", "", "", "a model")
        assert arguments == f"--run-dir {tmp_path} --index 6 --host 10.0.0.4"
    finally:
        (tmp_path / "stop-servers").touch()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_only_training_gets_segments_that_grow() -> None:
    """slurm/network.sh applies to the whole job; slurm/task.sh runs preflight and training."""
    assert "expandable_segments" not in (ROOT / "slurm" / "network.sh").read_text()
    assert "-expandable_segments:True}" in (ROOT / "slurm" / "task.sh").read_text()


TEACHERS = "server_nodes=1 servers_per_node=1 server_gpus=8 server_arguments=--x teacher_nodes=1"


def test_a_teacher_has_nodes_before_those_of_the_engines(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    told = f"{TEACHERS} teacher_servers=($'t\\t1\\t2\\t4\\t--model\\tM')"  # spaces would end a line of this settings.py
    calls = submit(tmp_path, SLURM_JOB_NUM_NODES="3", KDRL_PREFLIGHT="0", SERVERS=told)
    (engines, teacher) = [call for call in calls if "slurm/serve.sh" in call]
    assert " --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n3 " in engines
    assert " --nodes=1 --ntasks=2 --ntasks-per-node=2 --nodelist=n2 --job-name=teacher-t " in teacher
    assert teacher.endswith("-m kdrl_mcore.cli serve-teacher --model\tM")
    (train,) = [call for call in calls if "kdrl_mcore.train" in call]
    assert " --nodes=1 " in train


def test_teachers_share_their_nodes_and_say_how_they_are_served(
    settings: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    several = ["objective=kdrl", "student.path=s", "cluster.teacher_nodes=4", "data.sources=[{path: m.jsonl, name: m}]"]
    for name, tensor in (("a", 4), ("b", 8)):
        several += [f"teachers.{name}.path={name}", f"teachers.{name}.values=[m]", f"teachers.{name}.server.kind=completions"]
        several += [f"teachers.{name}.parallel.tensor={tensor}"]
    one, two = settings.teacher_nodes(load_config(several), 8)
    assert (one.name, one.nodes, one.per_node, one.gpus) == ("a", 2, 2, 4) and (two.nodes, two.per_node, two.gpus) == (2, 1, 8)
    assert "--kind completions --name a --dtype float32" in " ".join(one.arguments)
    assert settings.main(several) == 0
    printed = capsys.readouterr().out
    assert "teachers.a.server.replicas=2 teachers.b.server.replicas=2)" in printed and "teacher_nodes=4\n" in printed
    with pytest.raises(ConfigError, match="are divided among the teachers"):
        load_config([*several, "cluster.teacher_nodes=3"])
