"""Loggers for the tests, named as MODULE:NAME: one records its calls, others fail or never return."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_mcore.monitoring.loggers.interface import FIRST, LoggedRun

RECORDED = "recorded.jsonl"
BROKEN = "broken"
"""A file of the run directory: while it is there, nothing can be logged."""


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The calls of the run's logger."""
    return [json.loads(line) for line in (run_dir / RECORDED).read_text().splitlines()]


class RecordedLogger:
    """Writes its calls to `RUN/recorded.jsonl`; keeps every value, as MLflow does."""

    def __init__(self, run: LoggedRun) -> None:
        self._run = run
        self.run_id: str | None = run.run_id or f"id {time.time_ns()}"
        self.last_step: int | None = FIRST if run.run_id is None else None
        self._write({"opens": run.name, "project": run.project, "after": run.step, "id": self.run_id, "resumes": run.run_id})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if (self._run.run_dir / BROKEN).exists():
            raise ConnectionError("nobody answers\nat port 1")
        self._write({"step": step, **metrics})

    def close(self, *, failed: bool) -> None:
        self._write({"closes": "failed" if failed else "well"})

    def _write(self, row: Mapping[str, Any]) -> None:
        with (self._run.run_dir / RECORDED).open("a") as file:
            file.write(json.dumps(row) + "\n")


class StuckLogger(RecordedLogger):
    """A service that never responds."""

    def __init__(self, run: LoggedRun) -> None:
        super().__init__(run)
        time.sleep(1000)


class DyingLogger(RecordedLogger):
    """A library that ends its process."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise SystemExit(3)
