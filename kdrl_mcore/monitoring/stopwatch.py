"""Seconds that a device spends on a stretch of work, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the stretches of work between two looks at it: by a pair of events each on CUDA, by the clock on CPU."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Time what is launched here; on CUDA it takes two records in the stream, and nothing is waited for."""
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since the last look. On CUDA the work must be done: call it after the device was waited for anyway."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        self._events, self._seconds = [], 0.0
        return seconds
