"""A pool of verifier processes that can be killed: each answer has a time limit, and no answer can affect another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from kdrl_mcore.errors import RewardError
from kdrl_mcore.resilience.interrupt import children_ignore_stop_signals
from kdrl_mcore.reward import worker as protocol
from kdrl_mcore.reward.verdicts import CRASH, TIMEOUT, Unjudged

MEMORY_BYTES = 1 << 30
"""The address space of one worker. math-verify needs about 70 MB."""

START_SECONDS = 120.0
"""How long a worker may take to start: importing sympy from a cold network file system is slow."""

_GRACE_SECONDS = 5.0  # by how much a worker's own time limit exceeds the parent's


@dataclass
class _Worker:
    """One process. It is starting until its first reply, then idle, or busy with the pair at index `task`."""

    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    task: int | None = None

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    @property
    def replies(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def give(self, task: int, pair: tuple[str, str], timeout: float) -> None:
        """Send one pair.

        Raises:
            BrokenPipeError: the process has ended.
        """
        assert self.process.stdin is not None
        self.task, self.deadline = task, time.monotonic() + timeout
        self.process.stdin.write(json.dumps(pair).encode() + b"\n")
        self.process.stdin.flush()


class WorkerPool:
    """Compares (reference, answer) pairs in separate processes. Not thread-safe.

    Processes start when they are first needed, as fresh interpreters (a process with threads or a GPU must not be forked), and
    live until `close`, the end of this process, or a pair that kills them. A pair that exceeds the time limit or the memory
    limit or crashes the interpreter is `Unjudged` and counted in `timeouts` or `crashes`; a new process takes over.

    Attributes:
        timeouts: the number of pairs so far that exceeded the time limit.
        crashes: the number of pairs so far that ended their process.
        undecided: the pairs of the last `compare` that did either.
    """

    def __init__(self, function: str, workers: int, timeout: float) -> None:
        """Args:
        function: what the workers call, as `MODULE:FUNCTION`, with (reference, answer) -> bool.
        workers: the largest number of processes.
        timeout: the time limit for one pair, in seconds.
        """
        self.timeouts = 0
        self.crashes = 0
        self.undecided: set[tuple[str, str]] = set()
        self._command = [
            *(sys.executable, "-m", protocol.__name__),
            *(function, str(MEMORY_BYTES), str(timeout + _GRACE_SECONDS)),
        ]
        self._count = workers
        self._timeout = timeout
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool | Unjudged]:
        """Whether each pair is equal, in order; `Unjudged`, which is false, if comparing it took too long or ended the process.

        Raises:
            RewardError: a worker does not start, or fails on the trivial pair that every new worker is tested with. So a
                broken installation is never mistaken for wrong answers.
        """
        verdicts: list[bool | Unjudged] = [False] * len(pairs)
        waiting = deque(range(len(pairs)))
        self.undecided = set()
        try:
            self._drop_dead()
            while waiting or any(worker.task is not None for worker in self._workers):
                busy = sum(worker.task is not None for worker in self._workers)
                while len(self._workers) < min(self._count, len(waiting) + busy):
                    self._workers.append(self._start())
                for worker in [worker for worker in self._workers if worker.idle]:
                    if waiting:
                        self._give(worker, waiting.popleft(), pairs, verdicts)
                for worker in self._heard_from():
                    self._receive(worker, pairs, verdicts)
                self._end_overdue(pairs, verdicts)
        except BaseException:  # the next batch would mistake the remaining replies of this one for its own
            self.close()
            raise
        return verdicts

    def close(self) -> None:
        """Kill every worker. The pool can be used again: it then starts new ones."""
        _stop_all(self._workers)

    def _start(self) -> _Worker:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        pipe = subprocess.PIPE
        try:
            # If a preemption's SIGTERM killed a worker, its answer would count as wrong in the step that is about to be saved.
            with children_ignore_stop_signals():
                process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
        except OSError as error:
            raise RewardError(f"cannot start a verifier process ({error}): check the limit on processes and memory") from error
        return _Worker(process, time.monotonic() + START_SECONDS)

    def _give(self, worker: _Worker, task: int, pairs: Sequence[tuple[str, str]], verdicts: list[bool | Unjudged]) -> None:
        try:
            worker.give(task, pairs[task], self._timeout)
        except BrokenPipeError:
            verdicts[task] = CRASH
            self.crashes += 1
            self.undecided.add(pairs[task])
            self._discard(worker)

    def _heard_from(self) -> list[_Worker]:
        """Wait for the first reply or death of a worker, or for the nearest deadline; returns the workers concerned."""
        active = {worker.replies: worker for worker in self._workers if not worker.idle}
        if not active:
            return []
        patience = min(worker.deadline for worker in active.values()) - time.monotonic()
        return [active[descriptor] for descriptor in wait(list(active), max(0.0, patience))]  # type: ignore[index]

    def _receive(self, worker: _Worker, pairs: Sequence[tuple[str, str]], verdicts: list[bool | Unjudged]) -> None:
        reply = os.read(worker.replies, 1)
        if not worker.ready:
            if not reply:
                raise RewardError(
                    f"a verifier process does not start ({_last_error(worker)}): check the math-verify installation"
                )
            worker.ready = True
        elif reply:
            assert worker.task is not None
            verdicts[worker.task] = reply == protocol.RIGHT
            worker.task = None
        else:
            assert worker.task is not None
            verdicts[worker.task] = CRASH
            self.crashes += 1
            self.undecided.add(pairs[worker.task])
            self._discard(worker)

    def _end_overdue(self, pairs: Sequence[tuple[str, str]], verdicts: list[bool | Unjudged]) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self._workers if not worker.idle and worker.deadline <= now]:
            if not worker.ready:
                raise RewardError(
                    f"a verifier process did not start within {START_SECONDS:.0f} s: check the math-verify installation"
                )
            assert worker.task is not None
            verdicts[worker.task] = TIMEOUT
            self.timeouts += 1
            self.undecided.add(pairs[worker.task])
            self._discard(worker)

    def _drop_dead(self) -> None:
        """Discard workers that ended while idle (killed from outside)."""
        for worker in [worker for worker in self._workers if worker.idle and worker.process.poll() is not None]:
            self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _stop(worker)


def _last_error(worker: _Worker) -> str:
    """The last line on the standard error of a worker that has ended."""
    assert worker.process.stderr is not None
    code = worker.process.wait()
    lines = worker.process.stderr.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    for stream in (worker.process.stdin, worker.process.stdout, worker.process.stderr):
        assert stream is not None
        try:
            stream.close()
        except BrokenPipeError:  # the pair that could not be sent is still in the buffer
            continue


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        _stop(workers.pop())
