"""A pool of ranks: processes that share one torch.distributed world, kept alive and reused by many tests.

Ranks are forked from a process that has imported what they need. Running a function on a started pool costs almost nothing.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.support.fork_server import ForkServer, Preparation, import_torch, import_training, server_for

START_TIMEOUT = 180.0  # seconds for all ranks to join the world
GRACE = 5.0  # seconds the other ranks get to answer after one has failed


class RankError(RuntimeError):
    """A rank failed with an exception that cannot be sent to the test; the message is its traceback."""


class RankDiedError(RuntimeError):
    """A rank's process ended while it was running a function."""


class RankTimeoutError(TimeoutError):
    """Some ranks did not finish in time; their stacks have been written to stderr."""


@dataclass
class _Answer:
    """The answer of one rank: a result, or an exception (None if it cannot be pickled) with its traceback."""

    result: Any = None
    failed: bool = False
    exception: BaseException | None = None
    trace: str = ""


@dataclass
class _Rank:
    server: ForkServer
    pid: int
    connection: Connection


class RankPool:
    """`world_size` processes that run functions together, with torch.distributed initialised and torchrun's environment.

    The processes start at the first `run`. After a timeout, the death of a rank, or an exception on some ranks only, they are
    killed, and the next `run` starts new ones: a failure does not spread to the next test.

    Args:
        prepare: a function, importable by name, that each rank calls before it joins the world and before it imports anything
            of this project or of Megatron-Core.
        import_first: folders whose packages the ranks import in place of the installed ones.
        environment: variables that are set before torch is imported, and in the ranks.
        backend: torch.distributed's backend for the world.
        preload: a function, importable by name, that is called once in the process from which the ranks are forked. By default
            it imports everything that a training run imports; with a `prepare`, torch alone.
    """

    def __init__(
        self,
        world_size: int,
        import_first: Sequence[str] = (),
        prepare: Callable[[], object] | None = None,
        backend: str = "gloo",
        environment: Mapping[str, str] | None = None,
        preload: Callable[[], object] | None = None,
    ) -> None:
        self.world_size = world_size
        self._prepare, self._backend = prepare, backend
        preload = preload or (import_training if prepare is None else import_torch)
        self.preparation = Preparation(preload, tuple(import_first), tuple(sorted((environment or {}).items())))
        self._ranks: list[_Rank] = []
        self._store: dist.TCPStore | None = None
        atexit.register(self.close)

    @property
    def pids(self) -> list[int]:
        """The process ids of the running ranks, in order; empty when the pool is not started."""
        return [rank.pid for rank in self._ranks]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Call `function(*args)` on all ranks at once and return the results by rank.

        Args:
            function: importable by name in another process, that is, defined at the top level of a module; arguments and
                results are pickled.
            timeout: in seconds, not counting the start of the pool.

        Raises:
            Exception: the exception of the lowest rank that failed, with that rank's traceback as a note.
            ForkServerError: the process from which the ranks are forked cannot be prepared.
            RankDiedError: a rank's process ended.
            RankTimeoutError: not all ranks finished in time.
        """
        task = pickle.dumps((function, args))
        try:
            self._start()
            for rank in self._ranks:
                rank.connection.send_bytes(task)
            answers = self._collect(f"{function.__module__}.{function.__qualname__}", timeout)
        except BaseException:
            self.close()
            raise
        failed = {rank: answer for rank, answer in answers.items() if answer.failed}
        if not failed:
            return [answers[rank].result for rank in range(self.world_size)]
        # If all ranks raised the same type of error they are in step with each other; anything else may have left a
        # collective half finished.
        if len(failed) < self.world_size or len({type(answer.exception) for answer in failed.values()}) > 1:
            self.close()
        first = min(failed)
        raise _exception_of(first, failed[first])

    def close(self) -> None:
        """Kill the ranks and everything they started. The next `run` starts new ones."""
        for rank in self._ranks:
            rank.server.end(rank.pid)
            rank.connection.close()
        self._ranks, self._store = [], None

    def _start(self) -> None:
        # The ranks have not been asked anything yet, so only the end of a rank can make its connection readable.
        if self._ranks and not wait([rank.connection for rank in self._ranks], 0):
            return
        self.close()
        server = server_for(self.preparation)
        # The store lives in this process, as in torchrun's agent: its port is known to be free, and ranks only connect to it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for index in range(self.world_size):
            settings = (index, self.world_size, self._store.port, self._prepare, self._backend)
            pid, connection = server.fork(_serve, *settings)
            self._ranks.append(_Rank(server, pid, connection))
        answers = self._collect("starting", START_TIMEOUT)
        for index, answer in answers.items():
            if answer.failed:
                raise _exception_of(index, answer)

    def _collect(self, what: str, timeout: float) -> dict[int, _Answer]:
        """The answers of all ranks, or those that came soon enough after the first failure."""
        deadline = time.monotonic() + timeout
        answers: dict[int, _Answer] = {}
        dead: dict[int, int | None] = {}
        hurried = False
        while len(answers) + len(dead) < self.world_size:
            silent = {index: rank for index, rank in enumerate(self._ranks) if index not in answers and index not in dead}
            ready = wait([rank.connection for rank in silent.values()], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for index, rank in silent.items():
                if rank.connection in ready:
                    try:
                        answers[index] = pickle.loads(rank.connection.recv_bytes())
                    except (EOFError, ConnectionError):
                        dead[index] = rank.server.end(rank.pid, patience=1.0)
            if not hurried and (dead or any(answer.failed for answer in answers.values())):
                hurried, deadline = True, min(deadline, time.monotonic() + GRACE)
        if dead:
            index, code = min(dead.items())
            raise RankDiedError(f"rank {index} of {self.world_size} died in {what} (exit code {code})")
        if len(answers) < self.world_size and not hurried:
            late = [index for index in range(self.world_size) if index not in answers]
            for index in late:
                os.kill(self.pids[index], signal.SIGUSR1)
            time.sleep(0.5)  # time to write the stacks
            raise RankTimeoutError(f"ranks {late} of {self.world_size} did not finish {what} in {timeout:g} s")
        return answers


def _exception_of(rank: int, answer: _Answer) -> BaseException:
    if answer.exception is None:
        return RankError(f"rank {rank} raised\n{answer.trace}")
    answer.exception.add_note(f"raised on rank {rank}\n{answer.trace}")
    return answer.exception


def _serve(
    connection: Connection, rank: int, world_size: int, port: int, prepare: Callable[[], object] | None, backend: str
) -> None:
    """Run a rank: join the world, then run the functions that arrive until killed."""
    faulthandler.enable()  # a rank that a signal kills prints the stacks of its threads
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    connection.send_bytes(_answer(_join, prepare, backend))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(_call, task))


def _join(prepare: Callable[[], object] | None, backend: str) -> None:
    if prepare is not None:
        prepare()
    dist.init_process_group(backend)


def _call(task: bytes) -> Any:
    _destroy_left_groups()
    function, args = pickle.loads(task)
    return function(*args)


def _destroy_left_groups() -> None:
    """Destroy the process groups that the last function left: each has threads that keep waking up. All ranks have answered, so
    none uses these groups any more."""
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    left = set(dist.distributed_c10d._world.pg_map) - {dist.group.WORLD}
    for group in left:
        dist.destroy_process_group(group)
    if "kdrl_mcore.parallel.groups" in sys.modules:
        sys.modules["kdrl_mcore.parallel.groups"].forget_groups()
    if left:
        gc.collect()


def _answer(function: Callable[..., Any], *args: Any) -> bytes:
    """The pickled answer; a result that cannot be pickled counts as a failure."""
    try:
        return pickle.dumps(_Answer(result=function(*args)))
    except BaseException as error:  # SystemExit too: the test must see it, and the rank stays alive
        trace = "".join(traceback.format_exception(error))
        error.__traceback__ = error.__cause__ = error.__context__ = None
        try:
            answer = pickle.dumps(_Answer(failed=True, exception=error, trace=trace))
            pickle.loads(answer)
            return answer
        except Exception:  # an exception that cannot be pickled or unpickled
            return pickle.dumps(_Answer(failed=True, trace=trace))
