"""Signals that ask the run to stop: SIGTERM (a preemption, `timeout`, torchrun), SIGUSR1 (a scheduler's warning before the time
limit), SIGINT (Ctrl-C) and SIGHUP (the terminal was closed).

A signal only sets a flag. The training loop checks it between two steps, where all ranks agree on it, save and end. Terminals
and schedulers send these signals to every process, so the processes that a rank starts must survive them.

A second Ctrl-C ends the process at once. The main thread may be waiting in a collective, where Python runs no handlers, so a
thread receives the signals too: C code writes the number of each to a pipe (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
"""The exit code of a run that a second Ctrl-C ended, by the shell's convention."""
MOMENT_SECONDS = 1.0
"""The same Ctrl-C may arrive twice, from the terminal and through torchrun: signals within this time count as one."""
LISTENER_SECONDS = 5.0
"""How long to wait for the thread that listens; it may be writing to a terminal that does not answer."""
REST_SECONDS = 0.05
"""Thousands of times as long as a thread needs to release its objects."""
_PR_SET_PDEATHSIG = 1
_NO_MORE = 0  # no signal has this number


class StopRequest:
    """Whether this process was asked to stop. A context manager: it listens for signals inside, and restores earlier handlers.

    Only a process's main thread can listen; in other threads, and for signals whose handler was not set from Python (and so
    cannot be restored), nothing changes. A SIGHUP that is ignored (`nohup`) stays ignored.
    """

    def __init__(self, announce: Callable[[str], None] | None = None, *, says_end: bool = True) -> None:
        """Args:
        announce: called once, in a separate thread, with the name of the first signal.
        says_end: whether a line says that a second Ctrl-C ended this process; one of a machine's ranks is enough.
        """
        self.received: str | None = None
        """The name of the first signal received."""
        self._announce = announce
        self._says_end = says_end
        self._previous: dict[signal.Signals, Any] = {}
        self._interrupted: float | None = None  # the time of the first Ctrl-C
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._pipe: int | None = None  # to the thread that listens
        self._thread: threading.Thread | None = None
        self._previous_pipe = -1

    @property
    def reason(self) -> str:
        """Why the run stops, on a rank that may not have received a signal itself."""
        return f"stopped on {self.received or 'the request of another rank'}"

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        heard, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True)
        self._thread.start()
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous is None or (number == signal.SIGHUP and previous == signal.SIG_IGN):
                continue
            signal.signal(number, self._remember)
            self._previous[number] = previous
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            os.write(self._pipe, bytes([_NO_MORE]))
            os.close(self._pipe)
            self._pipe = None
        if self._thread is not None:
            # A thread that is still letting go of its objects when Python ends can abort the process: through `announce` it may
            # hold the last process group, whose destructor waits for the interpreter.
            self._thread.join(LISTENER_SECONDS)
            self._thread = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self, heard: int) -> None:
        announced = False
        while (number := os.read(heard, 1)[0]) != _NO_MORE:
            if number not in STOP_SIGNALS:
                continue
            self._end_on_second_interrupt(number)
            if not announced and self._announce is not None:
                announced = True
                with suppress(OSError):  # the terminal is gone
                    self._announce(signal.Signals(number).name)
            if number == signal.SIGHUP:
                self._leave_terminal()
        os.close(heard)

    def _leave_terminal(self) -> None:
        """Discard further output, because writing to a terminal that is gone is an error."""
        if self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)
            self._terminals = []

    def _end_on_second_interrupt(self, number: int) -> None:
        """End the process on a second Ctrl-C, or on the SIGTERM that torchrun sends its ranks when it is interrupted again."""
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now if number == signal.SIGINT else None
        elif number in (signal.SIGINT, signal.SIGTERM) and now - self._interrupted > MOMENT_SECONDS:
            if self._says_end:
                with suppress(OSError):  # the terminal is gone
                    os.write(2, b"interrupted again: ended at once, without saving; earlier checkpoints are intact\n")
            os._exit(INTERRUPTED_EXIT_CODE)


def let_threads_finish() -> None:
    """Called before a fork: give threads of native code the moment in which they end their work and their use of Python.

    Before 3.12, CPython's forked process waits forever if such a thread was just then registering with the interpreter, as
    gloo's do after every collective to release what it sent: one fork in 4,000, directly after a broadcast of objects.
    """
    if sys.version_info < (3, 12):
        time.sleep(REST_SECONDS)


def end_with_parent(parent: int) -> None:
    """In a process that `parent` started: end when the parent does, for whatever reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)


@contextmanager
def children_ignore_stop_signals() -> Iterator[None]:
    """Processes started inside this context never receive `STOP_SIGNALS`, because they inherit this thread's signal mask. This
    process receives pending signals at the end of the context.

    Before starting processes with `multiprocessing`, call `start_resource_tracker`.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def start_resource_tracker() -> None:
    """Start the process in which `multiprocessing` tracks resources to remove, if it is not running. It would otherwise start
    with the first child process, and starting it unblocks SIGTERM and SIGINT in this thread, so the child would receive
    them."""
    with children_ignore_stop_signals():  # it ignores these two itself, but would die of the others
        resource_tracker.ensure_running()


def block_ignored_stop_signals() -> None:
    """Make all processes that this one starts from now on never receive the stop signals that it ignores, whatever handlers
    they set: the responses that an engine is sampling belong to the step that is still to be saved."""
    start_resource_tracker()
    ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
