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
from kdrl_mcore.errors import KdrlError  # noqa: E402


def main(overrides: list[str]) -> int:
    """Print the assignments; exit code 2 with one line for a wrong override."""
    try:
        config = load_config(overrides)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    settings = {
        "config_nodes": config.cluster.nodes,
        "ranks_per_node": ranks_per_node(config, visible_gpus()),
        "run_dir": Path(config.run.dir).absolute(),
    }
    print("\n".join(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()))
    return 0


def ranks_per_node(config: Config, gpus: int) -> int:
    """One rank per configured GPU. Without any GPU ranks are plain processes: at least as many as both layouts need."""
    per_node = config.cluster.gpus_per_node
    if gpus:
        return per_node
    student = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    teacher = config.teacher.parallel.tensor * config.teacher.parallel.pipeline
    return max(per_node, -(-math.lcm(student, teacher) // config.cluster.nodes))


def visible_gpus() -> int:
    """The GPUs the driver shows to this job on this node."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
