"""One run at a time in a run directory, on any file system that several machines share.

The lock is a small file that names its owner: machine, process and SLURM job. A thread of the owner touches it every `BEAT`
seconds. A dead owner loses it. An owner on the same machine is looked up by its process id; for one on another machine the file
is watched, and the lock is free if nobody touches it for `SILENCE` seconds; if a SLURM job starts again, its earlier start has
ended. Kernel locks would not suffice: cluster file systems are often mounted without them, and child processes inherit them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

import psutil

from kdrl_mcore.errors import StorageError

LOCK_FILE = "lock.json"
BEAT = 5.0
SILENCE = 60.0
"""Seconds. A live owner shows within one beat, but a file system's cache may hide several."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock.

    Attributes:
        machine: identifies the running kernel and its process id namespace: equal for two processes that can see each other.
        pid, started: the process's id, and its start time by the kernel's clock, since ids are reused.
        since: the time when it took the lock, for messages.
        job, start: the SLURM job, and how often it had been requeued.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: float
    since: str
    job: str = ""
    start: int = 0

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def this_process(environment: Mapping[str, str] = os.environ) -> Owner:
    """This process as an owner."""
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0.0,
        since=time.strftime("%F %T"),
        job=environment.get("SLURM_JOB_ID", ""),
        start=int(environment.get("SLURM_RESTART_COUNT", "0") or 0),
    )


class RunLock:
    """The lock of one run directory, for one process. A context manager; creates the directory if it is missing."""

    def __init__(self, run_dir: Path, me: Owner | None = None) -> None:
        """Args:
        me: the owner to be; this process by default.
        """
        self.path = run_dir / LOCK_FILE
        self.me = me or this_process()
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None
        self._made_folder = False

    def __enter__(self) -> RunLock:
        """Take the lock. If its owner is on another machine, it may take `SILENCE` seconds to find out whether it is alive.

        Raises:
            StorageError: another run holds it, or the run directory cannot be written.
        """
        try:
            self._made_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise StorageError(
                f"cannot write {error.filename or self.path}: {error.strerror or error}: set run.dir to a folder that can be "
                "written, or free disk space"
            ) from error
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        with suppress(OSError):  # if the file system is gone the lock stays, but nobody touches it any more
            if self._is_mine():
                self.path.unlink()
            if self._made_folder:
                self.path.parent.rmdir()  # fails unless the run wrote nothing

    def check(self) -> None:
        """Check that this process still holds the lock, which it loses if it stops too long (as a suspended job does).

        Raises:
            StorageError: another run has taken it.
        """
        owner = read_owner(self.path)
        if owner is not None and owner.token != self.me.token:
            raise StorageError(
                f"{self.path.parent} was taken over by {owner} because this run showed no activity: it ends here"
            )

    def _take(self) -> None:
        mine = self.path.with_name(f".{LOCK_FILE}.{self.me.token}")
        mine.write_text(json.dumps(asdict(self.me)) + "\n")
        looks = 0
        try:
            while not _link(mine, self.path):
                owner = read_owner(self.path)
                if owner is None:  # the file has just been removed, is being written, or was cut short by a full disk
                    looks += 1
                    time.sleep(BEAT / 100)
                    if looks > 100:
                        self.path.unlink(missing_ok=True)
                elif is_alive(owner, self.path, self.me):
                    raise StorageError(
                        f"{self.path.parent} is in use by {owner}: end that run, wait until it ends, or set another run.dir "
                        f"(if it has certainly ended, remove {self.path})"
                    )
                else:
                    self._remove_dead(owner, mine)
        finally:
            mine.unlink(missing_ok=True)

    def _remove_dead(self, dead: Owner, mine: Path) -> None:
        """Remove the lock of a dead owner. Several processes may try at once: a second lock file admits one of them."""
        removal = self.path.with_name(f".{LOCK_FILE}.{dead.token}.dead")
        if not _link(mine, removal):
            remover = read_owner(removal)
            if remover is None or not is_alive(remover, removal, self.me):
                removal.unlink(missing_ok=True)
            time.sleep(BEAT / 100)
            return
        try:
            owner = read_owner(self.path)
            if owner is not None and owner.token == dead.token:
                logger.info("%s was left by %s, which is gone", self.path, dead)
                self.path.unlink()
        finally:
            removal.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        owner = read_owner(self.path)
        return owner is not None and owner.token == self.me.token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the file system may come back
                if self._is_mine():
                    os.utime(self.path)


def read_owner(path: Path) -> Owner | None:
    """The owner of a lock; None where there is no lock, or its file names no owner."""
    try:
        with path.open() as file:  # opening a file makes a network file system fetch its current content
            known = json.load(file)
        return Owner(**{field.name: known[field.name] for field in fields(Owner)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def live_owner(run_dir: Path) -> Owner | None:
    """The owner that keeps this process out of a run directory; None if there is none. For a dead owner on another machine it
    may take `SILENCE` seconds to find out."""
    path = run_dir / LOCK_FILE
    owner = read_owner(path)
    return owner if owner is not None and is_alive(owner, path, this_process()) else None


def is_alive(owner: Owner, path: Path, me: Owner) -> bool:
    """Whether the owner of a lock is still running."""
    if owner.job and (owner.job, owner.start) < (me.job, me.start) and owner.job == me.job:
        return False  # SLURM ends a job before it starts it again
    if owner.machine == me.machine:
        return owner.pid != me.pid and _started(owner.pid) == owner.started  # this process's own earlier run is over
    return _is_touched(path, owner)


def _started(pid: int) -> float | None:
    """When a process of this machine started; None if it is gone, or has ended and waits for its parent."""
    if sys.platform == "linux":
        try:
            state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else float(numbers[18])
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _is_touched(path: Path, owner: Owner) -> bool:
    """Watch until the owner touches the file (it is alive), or has not for `SILENCE` seconds. Does not compare the clocks of
    two machines."""
    touched, deadline = _touched(path), time.monotonic() + SILENCE
    logger.info("%s names %s: watching for up to %.0f s whether that run is alive", path, owner, SILENCE)
    while time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        now = read_owner(path)
        if now is None or now.token != owner.token:
            return False
        if _touched(path) != touched:
            return True
    return False


def _touched(path: Path) -> int:
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name unless the name is taken: the one operation that is atomic on every shared file system."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with target.open("x") as file:
                file.write(source.read_text())
        except FileExistsError:
            return False
    return True


def _machine() -> str:
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with suppress(OSError):
            parts.append(read())
    return "/".join([socket.gethostname(), *parts])
