"""What the SLURM launcher needs from the configuration, as shell assignments: settings.py [key=value ...]."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not (HERE / "interpreter").exists() and (HERE.parent / "kdrl_mcore").is_dir():  # a checkout
    sys.path.insert(0, str(HERE.parent))

try:
    from kdrl_mcore.config import Config, load_config
    from kdrl_mcore.config.derived import ranks_per_node, section_of, server_arguments, servers_per_node
    from kdrl_mcore.config.teacher_nodes import teacher_nodes
    from kdrl_mcore.errors import KdrlError
except ImportError as error:
    sys.exit(f"error: {sys.executable} is not this project's Python ({error}): run make setup, or set KDRL_PYTHON")


def main(overrides: list[str]) -> int:
    """Print the assignments; exit code 2 with one line for a wrong override."""
    gpus = visible_gpus()
    try:
        config = load_config(overrides)
        per_server_node = servers_per_node(config, gpus)
        teachers = teacher_nodes(config, gpus)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    settings = {
        "config_nodes": config.cluster.nodes,
        "server_nodes": config.cluster.server_nodes,
        "teacher_nodes": sum(each.nodes for each in teachers),
        "servers_per_node": per_server_node,
        "gpus": gpus,
        "server_gpus": config.rollout.vllm.tensor if gpus else 0,
        "ranks_per_node": ranks_per_node(config, gpus),
        "run_dir": Path(config.run.dir).absolute(),
    }
    model = Path(config.student.path or "").absolute()
    arguments = server_arguments(config, model, config.rollout.vllm.gpu_memory_utilization)
    print("\n".join(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()))
    print(f"server_arguments={shlex.quote(shlex.join(arguments))}")
    overrides = server_overrides(config, per_server_node)
    overrides += [f"{section_of(config, each.name)}.server.replicas={each.nodes * each.per_node}" for each in teachers]
    print(f"server_overrides=({shlex.join(overrides)})")
    served = [f"{each.name} {each.nodes} {each.per_node} {each.gpus} {shlex.join(each.arguments)}" for each in teachers]
    print(f"teacher_servers=({shlex.join(served)})")
    return 0


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
