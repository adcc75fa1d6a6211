"""The loggers of a training run: TensorBoard writes its files in this process; each service has a separate process.

So training is not delayed by imports or by a service that is slow, unreachable or broken. If the training process is killed,
its runs are still closed, because the other processes see the end of their input.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

from kdrl_mcore.monitoring.loggers.following import Follower
from kdrl_mcore.monitoring.loggers.interface import FOLDER
from kdrl_mcore.monitoring.metrics import METRICS_FILE
from kdrl_mcore.resilience.interrupt import children_ignore_stop_signals

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for its services."""
POLL_SECONDS = 0.05
"""Interval between checks whether a process has ended."""
ENDED = "ended"
"""The word sent when training has ended without an error."""
IN_TRAINING = ("tensorboard",)
"""Loggers that only write files, so they run in the training process."""

logger = logging.getLogger(__name__)


class RunLoggers:
    """The loggers of a run, for rank 0. They read `metrics.jsonl` and `config.yaml`, which must exist."""

    def __init__(self, run_dir: Path, names: Sequence[str], step: int) -> None:
        """Start the loggers without waiting for them.

        Args:
            step: the step after which the run continues.
        """
        self._followers = [Follower(run_dir, name, step, logger.warning) for name in names if name in IN_TRAINING]
        self._processes = [_Process(run_dir, name, step) for name in names if name not in IN_TRAINING]
        self.update()

    def update(self) -> None:
        """Called after a step was written: log it, and pass on the processes' warnings."""
        for follower in self._followers:
            follower.send()
        for process in self._processes:
            process.warn()

    def close(self, *, failed: bool, on_wait: Callable[[], None] = lambda: None) -> None:
        """Close the runs, which takes at most `CLOSE_SECONDS`.

        Args:
            failed: the training ended with an error. Then this does not wait; the processes end by themselves.
            on_wait: called repeatedly while this waits.
        """
        for process in self._processes:
            process.end(failed)
        for follower in self._followers:
            follower.close(failed=failed)
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self._processes if not failed else []:
            process.wait(deadline, on_wait)


class _Process:
    """A process that follows the run for one service."""

    def __init__(self, run_dir: Path, name: str, step: int) -> None:
        self._run_dir, self._name = run_dir, name
        log = run_dir / FOLDER / f"{name.replace(':', '.')}.log"
        self._log = log
        self._warned = False
        options = [str(run_dir), name, "--follow", "--step", str(step)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file, children_ignore_stop_signals():
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "kdrl_mcore.monitoring.loggers", *options],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            logger.warning("%s: no process can be started for it (%s); %s has every step", name, error, METRICS_FILE)
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def warn(self) -> None:
        """Log the warnings of the process, or a warning that it has ended without one."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        ended = self._process.poll() is not None
        for line in (self._process.stdout.read() or b"").decode(errors="replace").splitlines():
            self._warned = True
            logger.warning(line)
        if ended and not self._warned:
            self._warned = True
            logger.warning(
                "%s: its process ended (exit code %d): training continues, and %s says why",
                *(self._name, self._process.returncode, self._log),
            )

    def end(self, failed: bool) -> None:
        """Ask the process to close its run."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.write(b"" if failed else ENDED.encode() + b"\n")
            self._process.stdin.close()

    def wait(self, deadline: float, on_wait: Callable[[], None]) -> None:
        """Wait until the process has ended, and kill it at the deadline."""
        if self._process is None:
            return
        while self._process.poll() is None and time.monotonic() < deadline:
            on_wait()
            time.sleep(POLL_SECONDS)
        if self._process.poll() is None:
            if not self._warned:
                logger.warning(
                    "%s did not accept all metrics within %.0f s of the run's end: python -m kdrl_mcore.monitoring.loggers %s "
                    "%s sends what is missing",
                    *(self._name, CLOSE_SECONDS, self._run_dir, self._name),
                )
                self._warned = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, SIGKILL)
            self._process.wait()
        if self._process.returncode == 0:
            self._warned = True  # it ended well: no warning is needed
        self.warn()
        assert self._process.stdout is not None
        self._process.stdout.close()
