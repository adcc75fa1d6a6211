"""Host syncs, counted by the line of kdrl_mcore that causes them: where the CPU waits for the GPU."""

from __future__ import annotations

import sys
from collections import Counter

syncs: Counter[str] = Counter()
"""How often the host waited, by "file:line kind"."""


def count_sync(kind: str) -> None:
    """The host waits."""
    syncs[f"{own_line()} {kind}"] += 1


def own_line() -> str:
    """The line of kdrl_mcore that the calling thread is in, as "file:line", or "-"."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        _, found, path = file.rpartition("/kdrl_mcore/")
        if found:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "-"
