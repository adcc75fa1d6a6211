"""The one line that says what is wrong: printed once, by the first rank that fails, as the last output of the run.

torchrun writes a report of some 40 lines when a rank has failed, after all ranks have ended. A process that outlives them
therefore prints the line while torchrun ends: torchrun's store then closes its connections, shortly before torchrun exits and
the shell continues. The report itself also shows the line, from the file that torchrun names for it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from kdrl_mcore.resilience.interrupt import children_ignore_stop_signals
from kdrl_mcore.resilience.store import own_store

_STORE_TIMEOUT = timedelta(seconds=5)
_PRINT_AT_END = """
import os, select, sys
*signs, line = sys.argv[1:]
poll = select.poll()
for sign in signs:
    poll.register(int(sign), select.POLLIN)
os.write(1, b"!")
poll.poll(600_000)
os.write(2, line.encode() + b"\\n")
"""


def print_error(error: BaseException | str, run: int = 0) -> None:
    """Print `error: ...` to standard error if no rank has done so yet in this run. Not collective.

    If the ranks have no store in common (no world yet, and no torchrun), every rank prints.

    Args:
        run: distinguishes the runs of one world.
    """
    line = f"error: {' '.join(str(error).split())}"
    _leave_for_torchrun(line)
    store = None
    with suppress(RuntimeError):  # the process with the store has ended: better twice than never
        store = own_store(_STORE_TIMEOUT)
        if store is not None and store.add(_key(run), 1) > 1:
            store.wait([f"{_key(run)}/printed"])  # torchrun kills the first rank as soon as this one ends
            return
    print_last(line)
    with suppress(RuntimeError):
        if store is not None:
            store.set(f"{_key(run)}/printed", "1")


def error_was_printed(run: int = 0) -> bool:
    """Whether some rank has called `print_error` in this run; later failures of others are its consequences. Not collective."""
    with suppress(RuntimeError):
        store = own_store(_STORE_TIMEOUT)
        return store is not None and store.check([_key(run)])
    return False


def print_last(line: str) -> None:
    """Print the line, or lines, to standard error; under torchrun, after its own report."""
    signs = _signs_of_the_end()
    if not signs:
        with suppress(OSError):  # the terminal is gone
            sys.stderr.write(f"{line}\n")  # not print(): unbuffered, another rank could write into the line
            sys.stderr.flush()
        return
    with children_ignore_stop_signals():
        waiting = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PRINT_AT_END, *map(str, signs), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=signs,
            start_new_session=True,  # torchrun kills the rest of a rank's process group
        )
    assert waiting.stdout is not None
    waiting.stdout.read(1)  # once it is ready, this rank may end
    for sign in signs:
        os.close(sign)


def _signs_of_the_end() -> list[int]:
    """File descriptors that become readable when torchrun, which started this rank, has written its report: the process itself
    and, on the first node, a connection to its store. None without torchrun, if torchrun would restart the ranks, and in jobs
    of slurm/launch.sh, which looks for the line in the logs as soon as torchrun has ended."""
    restarts = [os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or restarts[0] != restarts[1] or "KDRL_LAUNCHER" in os.environ:
        return []
    try:
        signs = [os.pidfd_open(os.getppid())]
    except (OSError, AttributeError):  # not on every system
        return []
    if os.environ.get("GROUP_RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        try:
            signs.append(socket.create_connection(address, _STORE_TIMEOUT.total_seconds()).detach())
        except OSError:  # torchrun has already ended
            os.close(signs.pop())
    return signs


def _leave_for_torchrun(line: str) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}))


def _key(run: int) -> str:
    return f"kdrl_mcore/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{run}"
