"""Train the unfinished runs of studies on this machine: `kdrl_mcore.train` in subprocesses, several at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.resilience.interrupt import StopRequest
from kdrl_mcore.studies.study import StudyRun

LOG_FILE = "train.log"
PLAN_FILE = "plan.json"
SECONDS_BETWEEN_LOOKS = 0.2
Status = Literal["finished", "failed", "stopped", "running elsewhere"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended and after how many seconds; for a failed run, `message` is the last error of its log."""

    run: StudyRun
    status: Status
    seconds: float
    message: str = ""


@dataclass(frozen=True)
class _Started:
    run: StudyRun
    process: subprocess.Popen[bytes]
    since: float


def is_finished(run: StudyRun) -> bool:
    """Whether the run has trained (and evaluated) its last step; for a planned run, whether its plan is written."""
    if run.planned:
        return (run.directory / PLAN_FILE).is_file()
    try:
        return int(read_metrics(run.directory)[-1]["step"]) == run.steps
    except DataError:
        return False


def run_missing(runs: Sequence[StudyRun], jobs: int, report: Callable[[Outcome], None]) -> bool:
    """Train every unfinished run, `jobs` at a time, and report each as it ends. A failure does not stop the others.

    Runs that another process is training are skipped: it holds the run's lock while it is alive. On Ctrl-C, SIGTERM, SIGUSR1
    or SIGHUP the running ones are asked to save and end.

    Returns:
        Whether it reached the end of the list without being asked to stop.

    Raises:
        ConfigError: a run needs more than one machine.
    """
    for run in runs:
        if run.nodes > 1:
            raise ConfigError(f"{run.name} needs {run.nodes} machines: submit it with --slurm, or set cluster.nodes=1")
    waiting, running = [run for run in runs if not is_finished(run)], list[_Started]()
    with StopRequest() as stop:
        try:
            while (waiting or running) and stop.received is None:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    started = _start(run)
                    if started is None:
                        report(Outcome(run, "running elsewhere", 0.0))
                    else:
                        running.append(started)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    report(_outcome(each))
        finally:
            for each in running:
                each.process.send_signal(signal.SIGTERM)
            for each in running:
                each.process.wait()
                report(_outcome(each))
    return stop.received is None


def _start(run: StudyRun) -> _Started | None:
    """Start a run with its output in `train.log`; None if another process is training it."""
    run.directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(run)
    if lock is None:
        return None
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.ranks}"] if run.ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "kdrl_mcore.train", *run.overrides, f"run.dir={run.directory}"]
    with lock, (run.directory / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],  # the run holds the lock until it ends, even if this process is killed
            start_new_session=True,  # Ctrl-C reaches only this process, which then asks the run to save
        )
    return _Started(run, process, time.monotonic())


def _lock(run: StudyRun) -> IO[bytes] | None:
    """The run's lock, named by its identity, because two studies may have different names for the run."""
    folder = run.root / ".locks"
    folder.mkdir(exist_ok=True)
    file = (folder / run.identity).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _outcome(started: _Started) -> Outcome:
    run, seconds, code = started.run, time.monotonic() - started.since, started.process.returncode
    if is_finished(run) and code == 0:
        return Outcome(run, "finished", seconds)
    if code in (0, -signal.SIGTERM):
        return Outcome(run, "stopped", seconds)
    return Outcome(run, "failed", seconds, f"exit code {code}: {last_line(run.directory / LOG_FILE)}")


def last_line(log: Path) -> str:
    """The last error line of a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
