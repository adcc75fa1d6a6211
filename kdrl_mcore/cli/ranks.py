"""Starts ranks on one machine, for `--ranks N`, with torchrun's agent.

It differs from torchrun itself in three ways, for users at a terminal: signals are passed on to the ranks, which have as much
time as they need to save and end; a rank prints its own error, without a report around it; and ranks end if the launcher is
killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdrl_mcore.cli.commands import LAUNCHER
from kdrl_mcore.resilience.interrupt import INTERRUPTED_EXIT_CODE, STOP_SIGNALS

_passed_on = set[int]()  # the signals so far


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run a command on `ranks` ranks, and wait until all have ended.

    If a rank fails, the others are ended. A rank that printed no error line (it was killed, or printed a traceback) is named,
    unless it ended by a signal that was passed on to it: it had not yet begun to listen, or it was interrupted again.

    Returns:
        The exit code: 0, or that of a failed rank; 128 plus the signal's number if it ended by one that was passed on.
    """
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup SIGHUP is ignored
            signal.signal(number, _pass_on)
    # torch before 2.9 handles signals itself, as torchrun does.
    has_choice = any(field.name == "signals_to_handle" for field in fields(LaunchConfig))
    left_to_ranks: dict[str, Any] = {"signals_to_handle": "SIGQUIT"} if has_choice else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **left_to_ranks,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if -first.exitcode in _passed_on or (first.exitcode == INTERRUPTED_EXIT_CODE and signal.SIGINT in _passed_on):
            return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
        said = any("error: " in str(failure.message) for failure in error.failures.values())  # the ranks record what they print
        if not said:
            how = f"ended with exit code {first.exitcode}" if first.exitcode > 0 else f"was ended by {_signal(first)}"
            with suppress(OSError):  # the terminal is gone
                print(f"error: rank {rank} {how}", file=sys.stderr)
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as stopped:  # SIGQUIT, and before torch 2.9 any
        return 128 + stopped.sigval
    return 0


def _signal(failure: ProcessFailure) -> str:
    killed = failure.signal_name() == signal.SIGKILL.name
    return f"{failure.signal_name()}{' (by Linux, if the machine ran out of memory)' if killed else ''}"


def _pass_on(number: int, frame: FrameType | None) -> None:
    _passed_on.add(number)
    ranks = psutil.Process().children()
    if not ranks:  # none has started
        sys.exit(128 + number)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank.pid, number)
