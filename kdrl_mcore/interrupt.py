"""Being asked to stop: SIGTERM (a preemption, a shutdown) and SIGUSR1 (a scheduler's warning before the time limit).

A signal only sets a flag. The training loop asks for it between two steps, where all ranks agree on it, save and end. SLURM
sends these signals to every process of a job step, so the processes a rank starts must not die of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop. A context manager: it listens inside, and restores what was there before.

    Only a process's main thread can listen; elsewhere, and for a signal whose handler was not set from Python (it cannot be
    restored), nothing is changed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """The name of the first signal that came."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous is None:
                continue
            try:
                signal.signal(number, self._remember)
            except ValueError:  # not the main thread
                return self
            self._previous[number] = previous
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


def end_with_parent(parent: int) -> None:
    """In a process that `parent` started: end when it does, however that comes (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


@contextmanager
def children_ignore_stop_signals() -> Iterator[None]:
    """Processes started inside never see `STOP_SIGNALS`: they inherit this thread's signal mask. For this process a signal
    that comes inside waits until the end."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
