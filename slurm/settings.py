"""What the SLURM launcher needs of the configuration, as shell assignments: settings.py [key=value ...]."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kdrl_mcore.config import Config, load_config  # noqa: E402
from kdrl_mcore.errors import ConfigError, KdrlError  # noqa: E402


def main(overrides: list[str]) -> int:
    """Print the assignments; exit code 2 with one line for a wrong override."""
    gpus = visible_gpus()
    try:
        config = load_config(overrides)
        per_server_node = servers_per_node(config, gpus)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    settings = {
        "config_nodes": config.cluster.nodes,
        "server_nodes": config.cluster.server_nodes,
        "servers_per_node": per_server_node,
        "server_gpus": config.rollout.vllm.tensor if gpus else 0,
        "ranks_per_node": ranks_per_node(config, gpus),
        "run_dir": Path(config.run.dir).absolute(),
    }
    print("\n".join(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()))
    print(f"server_arguments={shlex.quote(shlex.join(server_arguments(config)))}")
    print(f"server_overrides=({shlex.join(server_overrides(config, per_server_node))})")
    return 0


def ranks_per_node(config: Config, gpus: int) -> int:
    """One rank per configured GPU. Without any GPU ranks are plain processes: at least as many as both layouts need."""
    per_node = config.cluster.gpus_per_node
    if gpus:
        return per_node
    student = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    teacher = config.teacher.parallel.tensor * config.teacher.parallel.pipeline
    return max(per_node, -(-math.lcm(student, teacher) // config.cluster.nodes))


def server_arguments(config: Config) -> list[str]:
    """What the servers of `rollout=vllm` are told of the configuration. Their weights come from the trainer."""
    rollout = config.rollout
    values = {
        "model": Path(config.student.path or "").absolute(),
        "dtype": config.model.dtype,
        "max-model-len": rollout.max_prompt_tokens + rollout.max_response_tokens,
        "max-sequences": rollout.max_sequences,
        "tensor": rollout.vllm.tensor,
        "kv-cache-gib": rollout.vllm.kv_cache_gib,
        "seed": config.trainer.seed,
        "load-format": "dummy",
    }
    if rollout.vllm.gpu_memory_utilization is not None:
        values["gpu-memory-utilization"] = rollout.vllm.gpu_memory_utilization
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def servers_per_node(config: Config, gpus: int) -> int:
    """As many engines as fit a server node. Without any GPU one.

    Raises:
        ConfigError: none fits.
    """
    per_node, tensor = config.cluster.gpus_per_node, config.rollout.vllm.tensor
    if gpus and config.cluster.server_nodes and tensor > per_node:
        raise ConfigError(f"rollout.vllm.tensor={tensor} does not fit a server node of {per_node} GPUs: change it")
    return per_node // tensor if gpus else 1


def server_overrides(config: Config, per_node: int) -> list[str]:
    """Tell the trainer that its engines are the job's servers."""
    if config.rollout.engine != "vllm" or not config.cluster.server_nodes:
        return []
    return ["rollout.vllm.placement=server", f"rollout.vllm.replicas={config.cluster.server_nodes * per_node}"]


def visible_gpus() -> int:
    """The GPUs the driver shows to this job on this node."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
