"""Wall-clock time and GPU memory by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kdrl_mcore.monitoring.profiler import named_range


class Clock:
    """Sums the seconds spent in named phases: `with clock("rollout"): ...`."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        """`on_phase` is called with each phase's name when it begins."""
        self._on_phase = on_phase
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}
        """On CUDA, the peak memory of this rank's tensors in each phase, GiB."""
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase; on CUDA the host waits for its kernels, so that they do not count for the next phase."""
        if self._on_phase is not None:
            self._on_phase(phase)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            with named_range(phase):
                yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.peak_gib[phase] = max(self.peak_gib.get(phase, 0.0), torch.cuda.max_memory_allocated() / 2**30)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start
