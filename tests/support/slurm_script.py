"""The job script, run on a machine without SLURM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import ROOT

SRUN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [[ $* == *slurm/settings.py* ]]; then
  echo "config_nodes=2 ${SERVERS:-server_nodes=0} ranks_per_node=8 gpus=8" | tr ' ' '\\n'
  echo "run_dir=$RUN"
  echo "server_overrides=()"
fi
"""
ONE_SERVER = "server_nodes=1 servers_per_node=1 server_gpus=8 server_arguments=--x"
SCONTROL = """#!/usr/bin/env bash
echo "NodeName=n3 NodeAddr=10.0.0.3 " # its `show nodes`; of `show hostnames` only the number of lines counts
"""


def submit(folder: Path, *overrides: str, **settings: str) -> list[str]:
    """Run the script for two nodes with an srun that only records its arguments; returns these calls."""
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
