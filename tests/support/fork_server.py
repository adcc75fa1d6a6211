"""Processes forked from one that has imported everything: starting one costs a fork instead of seconds of imports.

This module imports nothing heavy: a server may have to prepare its process before it imports torch or Megatron-Core.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any
from unittest.mock import patch


class ForkServerError(RuntimeError):
    """The server could not prepare itself or has ended."""


def import_torch() -> None:
    """Import torch alone."""
    import torch

    torch.set_num_threads(1)  # a fork loses the threads of OpenMP's pool


def import_training() -> None:
    """Import everything that a training run imports; on a machine with GPUs, torch alone. CUDA does not survive a fork, so
    there the forked processes import the rest."""
    import_torch()
    import torch

    if torch.cuda.device_count():
        return
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import kdrl_mcore.cli.train
    import kdrl_mcore.trainer  # noqa: F401


@dataclass(frozen=True)
class Preparation:
    """What a server does before it forks. Processes that need the same preparation share a server.

    Attributes:
        call: a function, importable by name, that is called first.
        import_first: folders whose packages are imported in place of the installed ones.
        environment: (name, value) of each variable that is set from the start.
    """

    call: Callable[[], object] = import_training
    import_first: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


_servers: dict[Preparation, ForkServer] = {}


def server_for(preparation: Preparation) -> ForkServer:
    """This process's server with that preparation, started at the first call."""
    if preparation not in _servers or not _servers[preparation].is_alive():
        _servers[preparation] = ForkServer(preparation)
    return _servers[preparation]


class ForkServer:
    """A process that forks others. All of them end with the process that started it.

    Raises:
        ForkServerError: the preparation failed; the message is its traceback.
    """

    def __init__(self, preparation: Preparation) -> None:
        self._environment = dict(preparation.environment)
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        # Not a daemon: daemons may not have children.
        self._process = context.Process(target=_serve, args=(preparation, theirs), daemon=False)
        with patch.dict(os.environ, self._environment):
            self._process.start()
        theirs.close()
        atexit.register(self.close)
        problem = self._answer()
        if problem is not None:
            self.close()
            raise ForkServerError(f"cannot prepare a process to fork from\n{problem}")

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it can still fork."""
        return self._process.is_alive()

    def fork(self, target: Callable[..., None], *args: Any) -> tuple[int, Connection]:
        """Call `target(connection, *args)` in a forked process with a new session and process group, and with the working
        directory and environment that this process has now. It is killed, with its group, when this process ends.

        Returns:
            Its process id and the other end of the connection.
        """
        ours, theirs = multiprocessing.Pipe()
        # The server does not unpickle the call: every later process would inherit what its modules import, such as Triton.
        call = pickle.dumps((target, args))
        with theirs:
            self._control.send(("fork", call, os.getcwd(), {**os.environ, **self._environment}))
            send_handle(self._control, theirs.fileno(), self.pid)
        return self._answer(), ours

    def end(self, pid: int, patience: float = 0.0) -> int | None:
        """Wait up to `patience` seconds for a forked process to end, then kill it and what is left of its group.

        Returns:
            Its exit code: minus the signal's number if a signal killed it; None if it, or its server, had been ended before.
        """
        try:
            self._control.send(("end", pid, patience))
            return self._answer()
        except (OSError, ForkServerError):
            _kill_group(pid)
            return None

    def close(self) -> None:
        """End the server and with it every forked process. Only for the end of this process, or after an error."""
        self._process.kill()
        self._process.join()
        self._control.close()

    def _answer(self) -> Any:
        try:
            return self._control.recv()
        except (EOFError, ConnectionError) as error:
            raise ForkServerError("the process to fork from has ended") from error


def _serve(preparation: Preparation, control: Connection) -> None:
    """Run a server until its parent ends."""
    os.setsid()  # an interrupt at the terminal must not reach it
    inherited = dict(os.environ)
    sys.path[:0] = preparation.import_first
    try:
        preparation.call()
    except BaseException:
        control.send(traceback.format_exc())
        return
    gc.collect()
    gc.freeze()  # forked processes share the imported modules, which their collector need not visit
    control.send(None)
    parent = multiprocessing.parent_process()
    assert parent is not None
    children: dict[int, BaseProcess] = {}
    while control in wait([control, parent.sentinel]):
        try:
            kind, *request = control.recv()
        except (EOFError, ConnectionError):
            break
        if kind == "fork":
            with Connection(recv_handle(control)) as connection:
                settings = (control, connection, inherited, *request)
                child = multiprocessing.get_context("fork").Process(target=_run, args=settings, daemon=False)
                child.start()
                assert child.pid is not None
                children[child.pid] = child
                control.send(child.pid)
        else:
            pid, patience = request
            control.send(_end(children.pop(pid), patience) if pid in children else None)
    os._exit(0)  # without waiting for the forked processes, which end now


def _run(
    control: Connection,
    connection: Connection,
    inherited: Mapping[str, str],
    call: bytes,
    directory: str,
    environment: dict[str, str],
) -> None:
    """Run a forked process."""
    control.close()
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.chdir(directory)
    for name in inherited.keys() - environment.keys():
        os.environ.pop(name, None)
    os.environ.update(environment)
    target, args = pickle.loads(call)
    target(connection, *args)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


def _end(child: BaseProcess, patience: float) -> int | None:
    child.join(patience)
    assert child.pid is not None
    _kill_group(child.pid)
    child.kill()
    child.join()
    return child.exitcode


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
