"""Log a run's metrics to a service: once a run has ended, `python -m kdrl_mcore.monitoring.loggers RUN wandb` sends what the
service lacks. A run itself starts this command with `--follow`, in a separate process for each service."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.loggers.following import Follower
from kdrl_mcore.monitoring.loggers.processes import CLOSE_SECONDS, ENDED
from kdrl_mcore.monitoring.metrics import METRICS_FILE, read_metrics

POLL_SECONDS = 1.0
"""Interval between checks for new metrics."""
GRACE_SECONDS = 5.0
"""How long a process lives on, after the run has stopped waiting for it, before it ends by itself."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kdrl_mcore.monitoring.loggers", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("logger", help="tensorboard, wandb, mlflow, trackio, or MODULE:NAME")
    parser.add_argument("--follow", action="store_true", help="until the input ends: log what is new every second")
    parser.add_argument("--step", type=int, help="that the run continues after (default: its last one)")
    options = parser.parse_args(arguments)
    try:
        step = int(read_metrics(options.run)[-1]["step"]) if options.step is None else options.step
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    # What the services print goes to stderr, which is a log file if a run started this; only warnings go to stdout.
    warnings = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def warn(line: str) -> None:
        with suppress(OSError):  # the reader has ended
            print(line, file=warnings)

    follower = Follower(options.run, options.logger, step, warn)
    failed = False
    if options.follow:
        training = _Training()
        follower.send()
        while not training.ended.wait(POLL_SECONDS):
            follower.send()
        failed = training.failed
    sent = follower.close(failed=failed)
    if not options.follow and sent:
        print(f"{options.logger} has every step of {options.run / METRICS_FILE}", file=warnings)
    return 0 if sent else 1


class _Training:
    """The training process at the other end of stdin. This process ends soon after it, even if its main thread hangs.

    Attributes:
        ended: set when the input has ended.
        failed: the training ended with an error or was killed, so that `ENDED` was not sent.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.failed = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        self.failed = sys.stdin.readline().strip() != ENDED
        self.ended.set()
        time.sleep(CLOSE_SECONDS + GRACE_SECONDS)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
