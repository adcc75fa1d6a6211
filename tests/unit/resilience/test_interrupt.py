"""How a single process handles signals."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kdrl_mcore.resilience.interrupt import INTERRUPTED_EXIT_CODE, STOP_SIGNALS, StopRequest


@contextmanager
def handler(number: int, action: Any) -> Iterator[None]:
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_is_remembered_and_what_was_there_comes_back(number: signal.Signals) -> None:
    seen: list[int] = []
    with handler(number, lambda *args: seen.append(number)):
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the same Ctrl-C, passed on by torchrun
            assert stop.received == number.name and seen == []
        os.kill(os.getpid(), number)
        assert seen == [number]


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    with handler(signal.SIGHUP, signal.SIG_IGN), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_nothing_of_it_is_left_when_it_ends() -> None:
    """A thread that drops the last reference to a process group while Python ends aborts the process."""
    announced: list[str] = []

    def announce(name: str) -> None:
        time.sleep(0.3)
        announced.append(name)

    with StopRequest(announce):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert announced == ["SIGUSR1"] and not [thread for thread in threading.enumerate() if thread.name == "signals"]


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)


INTERRUPTED_TWICE = """
import os, signal, sys, time
import kdrl_mcore.resilience.interrupt as interrupt
interrupt.MOMENT_SECONDS = 0.0
with interrupt.StopRequest(print) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    sys.stdout.flush()
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(0.2)
print("goes on")
"""


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_interrupt_ends_the_process(second: str) -> None:
    """torchrun passes the second interrupt on as SIGTERM."""
    result = run(INTERRUPTED_TWICE.replace("sys.argv[1]", repr(second)))
    assert result.returncode == INTERRUPTED_EXIT_CODE and result.stdout == "SIGINT\n"
    assert len(result.stderr.splitlines()) == 1 and "interrupted again" in result.stderr


def test_a_hang_up_after_an_interrupt_is_no_second_one() -> None:
    result = run(INTERRUPTED_TWICE.replace("sys.argv[1]", "'SIGHUP'"))
    assert result.returncode == 0 and result.stdout == "SIGINT\ngoes on\n"


SPAWNED = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from kdrl_mcore.resilience.interrupt import STOP_SIGNALS, children_ignore_stop_signals, start_resource_tracker

def blocked():
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])

if __name__ == "__main__":
    start_resource_tracker()
    # Not multiprocessing's Pool, which ends its processes by the SIGTERM that these never receive.
    with children_ignore_stop_signals(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        print(set(STOP_SIGNALS) <= pool.submit(blocked).result())
    print(blocked())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.killpg(0, signal.SIGHUP)
    print(resource_tracker._resource_tracker._check_alive())
"""


def test_spawned_processes_never_see_them(tmp_path: Any) -> None:
    """If the resource tracker were started in between, it would unblock SIGTERM and SIGINT and die of SIGHUP."""
    (tmp_path / "spawned.py").write_text(SPAWNED)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "spawned.py")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        start_new_session=True,
    )
    assert (result.stdout, result.stderr) == ("True\nset()\nTrue\n", "")


ENGINE = """
import signal, subprocess, sys
from kdrl_mcore.resilience.interrupt import block_ignored_stop_signals
signal.signal(signal.SIGTERM, signal.SIG_IGN)
block_ignored_stop_signals()
sys.stdout.flush()
child = "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGTERM); print('lives')"
subprocess.run([sys.executable, "-c", child])
subprocess.run([sys.executable, "-c", child.replace("TERM", "USR1")])
"""


def test_what_a_server_ignores_does_not_reach_its_processes() -> None:
    """They set their own handlers; a signal that the server does not ignore reaches them."""
    assert run(ENGINE).stdout == "lives\n"


ON_A_TERMINAL = """
import os, sys, time
from pathlib import Path
from kdrl_mcore.resilience.interrupt import StopRequest
with StopRequest(print) as stop:
    print("listens", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    while os.fstat(2).st_rdev != os.stat(os.devnull).st_rdev:  # until the thread that listens has left it, this stream last
        time.sleep(0.01)
    print("what is still to be said", flush=True)
    print("and here", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text(f"saved on {stop.received}")
"""


def test_a_terminal_that_goes_away_is_not_written_to(tmp_path: Any) -> None:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "result")],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)
    said = b""
    while not said.endswith(b"\n"):  # the whole line: the terminal may pass it on in pieces
        said += os.read(terminal, 100)
    assert said.startswith(b"listens")
    os.close(terminal)
    assert process.wait(60) == 0 and (tmp_path / "result").read_text() == "saved on SIGHUP"
