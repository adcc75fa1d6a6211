"""Start training runs as subprocesses, and follow them by their metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import METRICS_FILE, read_metrics
from kdrl_mcore.monitoring.progress import key_numbers

ROOT = Path(__file__).resolve().parents[1]
"""The project root: every path of the examples is relative to it."""
SECONDS_BETWEEN_LINES = 5.0
LOG_LINES_ON_FAILURE = 15


@dataclass
class Job:
    """A training run in progress: its name, its run directory and its process."""

    name: str
    run_dir: Path
    log: Path
    process: subprocess.Popen[bytes]
    step_shown: int = -1


def start_training(name: str, run_dir: Path, overrides: Sequence[str], ranks: int = 1) -> Job:
    """Start `kdrl_mcore.train` with Hydra overrides, one thread per rank; its output goes to `RUN_DIR.log`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "kdrl_mcore.train", *overrides, f"run.dir={run_dir}"]
    log = run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Job(name, run_dir, log, process)


def follow(jobs: Sequence[Job]) -> None:
    """Print a short line for each job every few seconds until all have ended.

    Raises:
        KdrlError: a job failed (the end of its log is printed first); the others are stopped.
    """
    try:
        while any(job.process.poll() is None for job in jobs):
            _wait(jobs, SECONDS_BETWEEN_LINES)
            for job in jobs:
                _show_newest_step(job)
                _check(job)
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.process.terminate()
                job.process.wait()
    for job in jobs:
        _check(job)


def _wait(jobs: Sequence[Job], seconds: float) -> None:
    """Sleep for `seconds`, or until every job has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(job.process.poll() is None for job in jobs):
        time.sleep(0.1)


def _show_newest_step(job: Job) -> None:
    """Print the job's latest step, unless it was printed before, with the latest held-out accuracy."""
    file = job.run_dir / METRICS_FILE
    if not file.is_file() or not file.stat().st_size:
        return
    rows = read_metrics(job.run_dir)
    step = int(rows[-1]["step"])
    if step > job.step_shown:
        job.step_shown = step
        evaluated = [{"eval/accuracy": row["eval/accuracy"]} for row in rows if "eval/accuracy" in row]
        print(f"  {job.name:<10} step {step:<4} {key_numbers({**rows[-1], **(evaluated or [{}])[-1]})}", flush=True)


def _check(job: Job) -> None:
    code = job.process.poll()
    if code:
        print("\n".join(job.log.read_text(errors="replace").splitlines()[-LOG_LINES_ON_FAILURE:]), file=sys.stderr)
        raise KdrlError(f"training '{job.name}' ended with exit code {code}; its output is in {job.log}")
