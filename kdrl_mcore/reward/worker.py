"""One verifier process: `python -m kdrl_mcore.reward.worker MODULE:FUNCTION MEMORY_BYTES TIME_LIMIT`.

Reads one JSON pair `[reference, answer]` per line from standard input and answers each with one byte on standard output. It
imports neither torch nor the configuration, so that it starts in about a second. It ends with its input, and so with its
parent.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

READY, RIGHT, WRONG = b"r", b"1", b"0"
"""The replies: the function is loaded and finds 1 equal to 1; the answer equals the reference; it does not."""


def load(name: str) -> Callable[[str, str], bool]:
    """The function that `MODULE:FUNCTION` names, tested on the trivial pair (which also warms up its parser).

    Raises:
        RuntimeError: it does not find 1 equal to 1.
    """
    module, _, function = name.partition(":")
    compare = getattr(importlib.import_module(module), function)
    if compare("1", "1") is not True:
        raise RuntimeError(f"{name} does not find 1 equal to 1")
    return compare


def serve(compare: Callable[[str, str], bool], replies: int, time_limit: float) -> None:
    """Answer pairs until standard input ends.

    A pair that takes longer than `time_limit` seconds ends the process by SIGALRM's default action, which works without
    running Python code. The parent kills the process earlier; this limit is for one whose parent is gone.
    """
    os.write(replies, READY)
    for line in sys.stdin.buffer:
        reference, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        verdict = compare(reference, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, RIGHT if verdict else WRONG)


def _limit_resources(memory_bytes: int) -> None:
    """Cap the address space and forbid core dumps; leave Ctrl-C to the parent."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _keep_replies_apart() -> int:
    """Redirect standard output to standard error, so that nothing printed looks like a reply; returns the descriptor of the
    original standard output."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


def _silence() -> None:
    """Discard everything printed from now on, and forbid writing files."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main(function: str, memory_bytes: str, time_limit: str) -> None:
    """Load the function and serve. If loading fails, the process ends with the traceback on standard error."""
    _limit_resources(int(memory_bytes))
    logging.disable(logging.CRITICAL)
    replies = _keep_replies_apart()
    compare = load(function)
    _silence()
    serve(compare, replies, float(time_limit))


if __name__ == "__main__":
    main(*sys.argv[1:])
