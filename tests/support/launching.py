"""Start ranks as torchrun does, many times: `Launcher` runs in the test, `serve` in a second process.

The second process is forked, with everything imported, from the fork server that the pools of ranks use, and forks each rank,
so a start costs no imports. It holds the store, as torchrun's agent does, and ends all ranks when one fails.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tests.support.fork_server import Preparation, server_for

PATIENCE = 30.0
"""Seconds that the other ranks have after one failed, as with torchrun."""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        codes: the exit code of each rank; minus the signal's number if a signal killed it.
        output: what the ranks wrote to standard output and standard error.
    """

    codes: list[int]
    output: str


class Strike(NamedTuple):
    """A signal to every rank, sent once `file` has at least `lines` lines and `after` seconds have passed since the last
    signal.

    `to`: each rank's process alone ("leader"), or its process group; a group gets it twice, as from a terminal and torchrun.
    """

    file: str
    lines: int
    number: int
    to: str = "leader"
    after: float = 0.0


class Launcher:
    """A context manager that starts runs, one after the other."""

    def __enter__(self) -> Launcher:
        self._server = server_for(Preparation())
        self._pid, self._connection = self._server.fork(serve)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.end(self._pid)  # its ranks notice this and end
        self._connection.close()

    def train(
        self, ranks: int, overrides: Sequence[str], log: Path, strikes: Sequence[Strike] = (), own_processes: bool = False
    ) -> Ended:
        """Run `kdrl_mcore.train` once on so many ranks.

        Args:
            strikes: signals that are sent meanwhile, in this order.
            own_processes: whether each rank starts all processes of a checkpoint itself, as it does without this launcher.
        """
        self._connection.send((ranks, list(overrides), str(log), list(strikes), own_processes))
        return Ended(self._connection.recv(), log.read_text())


class WriteResults:
    """Returns the results of Megatron-Core's checkpoint writers to the processes that started them, for all processes forked
    here. Otherwise each would start another process for that, which imports torch at the first checkpoint."""

    def __init__(self) -> None:
        self._manager = multiprocessing.get_context("spawn").Manager()

    def use(self) -> None:
        """Use these results; called in a forked process before its first checkpoint."""
        from kdrl_mcore.parallel import mcore

        mcore._write_results_process = lambda: self._manager


def serve(connection: Connection) -> None:
    """Run what the test sends, one run after the other."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist

    import kdrl_mcore.cli.train
    import kdrl_mcore.trainer  # noqa: F401 - with everything that a run imports

    results = WriteResults()
    while True:
        ranks, overrides, log, strikes, own_processes = connection.recv()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = None if own_processes else results
        children = [_fork(rank, ranks, store.port, overrides, log, shared) for rank in range(ranks)]
        connection.send(_wait_for(children, strikes))
        del store


def _fork(rank: int, ranks: int, port: int, overrides: list[str], log: str, results: WriteResults | None) -> int:
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # the processes that a rank starts are killed with it
        _die_with(parent)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        if results is not None:
            results.use()
        else:
            resource_tracker._resource_tracker = resource_tracker.ResourceTracker()  # not the parent's
            for name in ("ensure_running", "register", "unregister", "getfd"):
                setattr(resource_tracker, name, getattr(resource_tracker._resource_tracker, name))
        from kdrl_mcore.cli.train import main

        code = main(overrides)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """End this process when its parent does (Linux)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _strike(strike: Strike, children: list[int]) -> None:
    for child in children:
        if strike.to == "group":
            os.killpg(child, strike.number)
        os.kill(child, strike.number)


def _num_lines(file: str) -> int:
    return Path(file).read_text().count("\n") if Path(file).exists() else 0


def _wait_for(children: list[int], strikes: list[Strike]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = None
    struck = time.monotonic()
    while len(codes) < len(children):
        if strikes and time.monotonic() >= struck + strikes[0].after and _num_lines(strikes[0].file) >= strikes[0].lines:
            _strike(strikes.pop(0), [child for rank, child in enumerate(children) if rank not in codes])
            struck = time.monotonic()
        for rank, child in enumerate(children):
            if rank in codes:
                continue
            if deadline is not None and time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank] and deadline is None:
                    deadline = time.monotonic() + PATIENCE
        time.sleep(0.02)
    for child in children:  # the checkpoint writers and verifiers of a rank that was killed
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return [codes[rank] for rank in range(len(children))]
