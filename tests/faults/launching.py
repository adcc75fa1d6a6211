"""Start ranks as torchrun does, many times: `Launcher` in the test, `python -m tests.faults.launching` beside it.

The process beside the test has everything imported and forks each rank, so a start costs no imports. It holds the store, as
torchrun's agent does, and when a rank ends badly it ends the others.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0
"""Seconds the other ranks have after one ended badly; torchrun gives 30."""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        codes: of each rank; minus a signal's number where one killed it.
        output: what the ranks wrote to standard output and standard error.
    """

    codes: list[int]
    output: str


class Launcher:
    """Starts runs, one after the other. A context manager."""

    def __enter__(self) -> Launcher:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.launching"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            start_new_session=True,  # ends with all that it started
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its ranks notice, and end
        self._process.communicate()

    def train(self, ranks: int, overrides: Sequence[str], log: Path) -> Ended:
        """One `kdrl_mcore.train` on so many ranks."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([ranks, list(overrides), str(log)]), file=self._process.stdin, flush=True)
        return Ended(json.loads(self._process.stdout.readline()), log.read_text())


class WriteResults:
    """Carries what Megatron-Core's checkpoint writers did back to the processes that started them, for all the processes
    forked here. Else each starts a process of its own for that, which imports torch at the first checkpoint."""

    def __init__(self) -> None:
        self._manager = multiprocessing.get_context("spawn").Manager()

    def use(self) -> None:
        """In a forked process, before its first checkpoint."""
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        filesystem_async._results_queue = self._manager.Queue()


def serve() -> None:
    """Run what the test sends, line by line."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist

    import kdrl_mcore.train
    import kdrl_mcore.trainer  # noqa: F401 - with all that a run imports

    results = WriteResults()
    for line in sys.stdin:
        ranks, overrides, log = json.loads(line)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = [_fork(rank, ranks, store.port, overrides, log, results) for rank in range(ranks)]
        print(json.dumps(_wait_for(children)), flush=True)
        del store


def _fork(rank: int, ranks: int, port: int, overrides: list[str], log: str, results: WriteResults) -> int:
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # what a rank starts dies with it
        _die_with(parent)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        results.use()
        from kdrl_mcore.train import main

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


def _wait_for(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(children):
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
    for child in children:  # the writers and verifiers of a rank that was killed
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return [codes[rank] for rank in range(len(children))]


if __name__ == "__main__":
    serve()
