"""How long a step of the tiny pair takes on one rank with one thread, phase by phase.

    python -m examples.tiny.benchmark [--objective grpo kdrl]

The student and the teacher must exist (examples/tiny/make_pair.py). Prints the median of each phase over all steps after the
first few, in which caches fill.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from examples.jobs import ROOT
from kdrl_mcore.monitoring.metrics import read_metrics

WARM_UP_STEPS = 5


def main() -> int:
    """Time each objective; returns 0, or the exit code of a run that failed."""
    parser = argparse.ArgumentParser(description="Time a step of the tiny pair on one rank with one thread.")
    parser.add_argument("--objective", nargs="+", default=["grpo", "kdrl"], help="presets to time (default: grpo kdrl)")
    parser.add_argument("--steps", type=int, default=25, help="steps measured (default: %(default)s)")
    arguments = parser.parse_args()
    for objective in arguments.objective:
        with tempfile.TemporaryDirectory() as run_dir:
            done = subprocess.run(
                command(objective, arguments.steps, run_dir), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True
            )
            if done.returncode:
                return done.returncode
            seconds = phase_medians(Path(run_dir))
        phases = "  ".join(f"{phase} {value:.3f}" for phase, value in seconds.items())
        print(f"{objective:<6} median of {arguments.steps} steps, seconds: {phases}", flush=True)
    return 0


def command(objective: str, steps: int, run_dir: str) -> list[str]:
    """The training run to time: no evaluation, checkpoint, export or display."""
    return [
        *(sys.executable, "-m", "kdrl_mcore.train", "experiment=tiny_cpu", f"objective={objective}", f"run.dir={run_dir}"),
        f"trainer.steps={WARM_UP_STEPS + steps}",
        *("eval.every=-1", "checkpoint.every=-1", "checkpoint.export_hf=false"),
        *("logging.progress=false", "logging.tensorboard=false", "logging.rollouts=false"),
    ]


def phase_medians(run_dir: Path) -> dict[str, float]:
    """Median seconds of each phase (`time/*`) over the run's steps after the warm-up."""
    rows = [row for row in read_metrics(run_dir) if row["step"] > WARM_UP_STEPS]
    phases = [name for name in rows[0] if name.startswith("time/")]
    return {name.removeprefix("time/"): median(row[name] for row in rows) for name in phases}


if __name__ == "__main__":
    sys.exit(main())
