"""Ends a run that hangs and names the rank that caused it; finds slow ranks by their own work.

On each rank a thread samples the main thread many times a second. A main thread inside a collective waits for other ranks;
otherwise it works (or hangs) by itself. The seconds of own work are counted by phase.

The main thread marks progress whenever a phase begins or a model runs forward. The threads add their ranks' marks to one number
in the job's store. While any rank makes progress the number grows, however long a phase takes. When it has not changed for the
time-out, every rank writes the stacks of its threads, one rank names the ranks that do not wait for others, and all end.

On CUDA the main thread waits wherever it reads a result of the GPU. NCCL's flight recorder (`flight_recorder.py`) shows whether
the GPU is waiting for other GPUs, and for how long. It covers only collectives, so the frames are examined too.

Neither torch nor Megatron-Core does this: the time-outs of gloo and NCCL end the ranks that wait, not the one they wait for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median_low
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from kdrl_mcore.errors import HANG_EXIT_CODE
from kdrl_mcore.resilience.flight_recorder import (
    Recorded,
    not_come,
    ranks_of_groups,
    read_recorder,
    recorded,
    seconds_in_collectives,
)
from kdrl_mcore.resilience.store import own_store
from kdrl_mcore.resilience.waiting import is_marked

SAMPLE_SECONDS = 0.05
"""Interval between samples of the main thread."""
STDERR = 2
"""Used by descriptor, since `sys.stderr` may be replaced, or its lock held by the thread that hangs."""
WAITING_MODULES = ("torch.distributed", "megatron.core.pipeline_parallel.p2p_communication")
"""A thread whose innermost frame is in one of these modules waits for other ranks. A thread in a function of ours that is
marked (`waiting.py`) waits for other ranks or for engines."""
WAITING_FOR_GPU = "torch.cuda"
"""The module of `synchronize`, which waits for kernels, collectives included. Counts as waiting without a flight recorder."""
SLOW_RATIO = 1.5
"""A rank is slow if its own work takes at least this many times as long as the median rank's ..."""
SLOW_SHARE = 0.1
"""... and if the difference, which delays all ranks, is at least this share of the measured time."""


@dataclass(frozen=True)
class Standing:
    """Where a rank's main thread is.

    Attributes:
        marks: the number of marks it has made since the start.
        waits: whether it waits for others, according to its frame or, on CUDA, to its flight recorder.
        place: its innermost frame: file, line and function.
        recorded: the content of the flight recorder; None on CPU, or if it cannot be read.
    """

    host: str
    step: int
    phase: str
    marks: int
    waits: bool
    place: str
    recorded: Recorded | None = None


class Watchdog:
    """Watches this process's main thread. A context manager; torch.distributed must be initialised."""

    def __init__(self, timeout: float, run: int = 0) -> None:
        """Args:
        timeout: seconds without progress on any rank after which the run ends; 0 never ends it.
        run: distinguishes the runs of one world.
        """
        self._timeout = timeout
        self._key = f"kdrl_mcore/watchdog/{run}"
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        store = own_store()
        assert store is not None
        self._store = store
        self._main = threading.get_ident()
        self._step, self._phase, self._marks = 0, "start", 0
        self._told = 0  # marks already added to the store
        self._total = -1
        self._moved = time.monotonic()
        self._interval = max(SAMPLE_SECONDS, min(5.0, (timeout or 50.0) / 10))  # between checks of the other ranks
        self._grace = 2 * self._interval + min(5.0, timeout)  # time for the others to answer
        self._own: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()  # the main thread and the watching thread both count
        self._begun: list[tuple[int, str]] = [(time.time_ns(), "start")]  # phases, for the flight recorder
        self._counted = -1  # the last record of the flight recorder
        self._has_recorder = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def step(self) -> int:
        """The present step."""
        return self._step

    @property
    def phase(self) -> str:
        """The present phase."""
        return self._phase

    def enter(self, step: int, phase: str) -> None:
        """Begin a phase."""
        self._step, self._phase = step, phase
        self._begun.append((time.time_ns(), phase))
        self.mark()

    def mark(self, *_: Any) -> None:
        """Record progress. It costs one addition; the signature is that of a module's forward pre-hook."""
        self._marks += 1

    def take_own_work(self) -> dict[str, float]:
        """Seconds of own work by phase since the last call: the time in which neither the main thread nor, on CUDA, the GPU
        waited for others. A collective that overlaps with work is subtracted too, which does not change who is slow: the rank
        that others wait for waits least."""
        self._subtract_collectives()
        own, self._own = self._own, defaultdict(float)
        self._begun = self._begun[-50:]  # collectives counted later may have begun in these phases
        return {phase: max(0.0, seconds) for phase, seconds in own.items()}

    def _subtract_collectives(self) -> None:
        """Subtract from the own work the GPU's time in collectives that have ended since the last call."""
        with self._counting:
            dump = read_recorder()
            self._has_recorder = dump is not None
            if dump is not None:
                seconds, self._counted = seconds_in_collectives(dump, self._counted, self._begun)
                for phase, each in seconds.items():
                    self._own[phase] -= each

    def _watch(self) -> None:
        looked = told = time.monotonic()
        try:
            while not self._stopped.wait(SAMPLE_SECONDS):
                now = time.monotonic()
                frame = sys._current_frames().get(self._main)
                if frame is not None and not _waits(frame, self._has_recorder):
                    self._own[self._phase] += now - looked
                looked = now
                if now - told >= self._interval:
                    told = now
                    self._subtract_collectives()  # the recorder keeps only the latest collectives
                    if self._timeout:
                        self._look_at_others(now)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look_at_others(self, now: float) -> None:
        # If the main thread never releases the interpreter, this thread cannot run; faulthandler's thread in C then ends the
        # process.
        faulthandler.dump_traceback_later(self._timeout + 2 * self._grace, exit=True, file=STDERR)
        marks = self._marks
        try:
            total = self._store.add(f"{self._key}/marks", marks - self._told)
            self._told = marks
        except RuntimeError:  # the process that holds the store has ended: count only our own marks
            total = self._total + marks - self._told
            self._told = marks
        if total != self._total:
            self._total, self._moved = total, now
        elif now - self._moved >= self._timeout:
            self._end()

    def _end(self) -> None:
        """Write the stacks, name the ranks that hang, and end the process."""
        frame = sys._current_frames()[self._main]
        innermost = traceback.extract_stack(frame)[-1]
        dump = read_recorder()
        known = None if dump is None else recorded(dump, ranks_of_groups())
        standing = Standing(
            socket.gethostname(),
            self._step,
            self._phase,
            self._marks,
            _waits(frame, known is not None) or bool(known and known.waits_in),
            f"{_short(innermost.filename)}:{innermost.lineno} in {innermost.name}",
            known,
        )
        _write(f"{_stacks(self._main)}\n", prefix=f"[rank {self._rank}] ")
        with suppress(RuntimeError):
            self._store.set(f"{self._key}/standing/{self._rank}", json.dumps(asdict(standing)))
            if self._store.add(f"{self._key}/ending", 1) == 1:
                _write(f"hang: {describe_hang(self._collect(), self._timeout)}\n")
                self._store.set(f"{self._key}/named", "1")
            else:  # the first process that ends takes the others with it
                self._wait_for([f"{self._key}/named"], 2 * self._grace)
        os._exit(HANG_EXIT_CODE)

    def _collect(self) -> list[Standing | None]:
        """Each rank's standing; None for a rank that does not answer in time."""
        keys = [f"{self._key}/standing/{rank}" for rank in range(self._world)]
        self._wait_for(keys, self._grace)
        return [_read_standing(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    def _wait_for(self, keys: Sequence[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._store.check(list(keys)) and time.monotonic() < deadline:
            time.sleep(SAMPLE_SECONDS)


def describe_hang(standings: Sequence[Standing | None], timeout: float) -> str:
    """One line that names the ranks that hang, and where.

    These are the ranks that do not answer and those that do not wait for others. If all ranks wait, the network hangs or a rank
    has taken another path. Then the rank with the least progress is named, of those that have not called a collective in which
    others wait if the flight recorder shows any.
    """
    named = [f"rank {rank} does not answer" for rank, standing in enumerate(standings) if standing is None]
    answered = {rank: standing for rank, standing in enumerate(standings) if standing is not None}
    alone = {rank: standing for rank, standing in answered.items() if not standing.waits}
    named += [
        f"rank {rank} on {standing.host} hangs in step {standing.step}, {standing.phase}, at {standing.place}"
        for rank, standing in alone.items()
    ]
    if not named:
        missing = not_come({rank: each.recorded for rank, each in answered.items() if each.recorded is not None}) or answered
        rank, standing = min(((rank, answered[rank]) for rank in missing), key=lambda item: item[1].marks)
        named = [
            f"every rank waits for another; least progress was made by rank {rank} on {standing.host}, in step "
            f"{standing.step}, {standing.phase}, at {standing.place}"
        ]
    waiting = len(answered) - len(alone)
    return (
        f"no rank made progress for {timeout:g} s: {'; '.join(named)}"
        f"{f'; {waiting} wait for others' if waiting < len(standings) else ''}; the stacks of every rank are above and in the "
        "other nodes' logs (trainer.hang_timeout)"
    )


def _read_standing(text: bytes) -> Standing:
    fields = json.loads(text)
    known = fields.pop("recorded")
    return Standing(**fields, recorded=None if known is None else Recorded(**known))


def slow_ranks(own_work: Sequence[Mapping[str, float]], seconds: float) -> list[tuple[int, str, float, float]]:
    """The slow ranks: (rank, phase, its seconds of own work, the median rank's), the most costly first.

    In each phase only the ranks that work in it are compared, since some phases run on a few ranks only.

    Args:
        own_work: seconds of own work by phase, for each rank.
        seconds: the time over which they were measured.
    """
    found = []
    for phase in dict.fromkeys(phase for own in own_work for phase in own):
        worked = [own[phase] for own in own_work if own.get(phase, 0.0) > 0]
        usual = median_low(worked) if worked else 0.0
        found += [
            (rank, phase, own[phase], usual)
            for rank, own in enumerate(own_work)
            if own.get(phase, 0.0) >= SLOW_RATIO * usual and own.get(phase, 0.0) - usual >= SLOW_SHARE * seconds
        ]
    return sorted(found, key=lambda each: each[3] - each[2])


def _waits(frame: FrameType, has_recorder: bool) -> bool:
    modules = WAITING_MODULES if has_recorder else (*WAITING_MODULES, WAITING_FOR_GPU)
    inside = f"{frame.f_globals.get('__name__')}."
    return is_marked(frame.f_code) or any(inside.startswith(f"{module}.") for module in modules)


def _stacks(main: int) -> str:
    """The stacks of this process's threads, the main thread's last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    parts = [
        f"Thread {names.get(ident, ident)} (most recent call last):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != threading.get_ident()
    ]
    return "".join(parts).rstrip()


def _write(text: str, prefix: str = "") -> None:
    lines = "".join(f"{prefix}{line}\n" for line in text.splitlines())
    with suppress(OSError):
        os.write(STDERR, lines.encode())


def _short(filename: str) -> str:
    """The last three parts of a path."""
    return "/".join(filename.rsplit("/", 3)[1:]) if filename.count("/") >= 3 else filename
