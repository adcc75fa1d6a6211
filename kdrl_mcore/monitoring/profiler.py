"""Traces of single steps (`trainer.profile`), and the ranges that name the phases of every step in profilers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kdrl_mcore.config import ProfileConfig

logger = logging.getLogger(__name__)


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range with this name in torch's profiler and, on CUDA, in Nsight Systems (NVTX); it costs a microsecond."""
    with record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class StepProfiler:
    """Writes a trace of each step in `trainer.profile.steps`, on the ranks in `trainer.profile.ranks`."""

    def __init__(self, settings: ProfileConfig, run_dir: Path, rank: int) -> None:
        self._steps = set(settings.steps) if rank in settings.ranks else set()
        self._folder = run_dir / "profile"
        self._rank = rank
        self._trace: profile | None = None

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Profile this block if the step is to be profiled."""
        if step not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with profile(activities=activities, record_shapes=True, profile_memory=True) as self._trace:
            yield

    def save(self, step: int) -> None:
        """Write the trace of the last profiled step unless it is already written. Perfetto and chrome://tracing can open it.

        Raises:
            OSError: it cannot be written.
        """
        if self._trace is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:06d}_rank_{self._rank}.json.gz"
        unfinished = path.with_name(f"unfinished_{path.name}")
        self._trace.export_chrome_trace(str(unfinished))
        self._trace = None
        unfinished.replace(path)
        logger.info("step %d: wrote the profile to %s", step, path)
