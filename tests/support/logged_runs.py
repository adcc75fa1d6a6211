"""Run directories whose metrics a logger follows, in this process."""

from __future__ import annotations

import math
from pathlib import Path

from kdrl_mcore.config import load_config, save_config
from kdrl_mcore.monitoring.loggers.following import Follower
from kdrl_mcore.monitoring.metrics import MetricsLog

RECORDED = "tests.support.recorded_logger:RecordedLogger"


def new_run(run_dir: Path, *overrides: str) -> Path:
    """A run without a step yet."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(load_config(["objective=grpo", f"run.dir={run_dir}", *overrides]), run_dir / "config.yaml")
    write(run_dir)
    return run_dir


def write(run_dir: Path, *steps: int, after: int | None = None, reward: float = 0.0) -> None:
    """More steps; with `after`, the run has gone back to that one."""
    with MetricsLog(run_dir) as log:
        if after is not None:
            log.truncate_after(after)
        for step in steps:
            log.write(step, {"reward": reward or step / 10})


def follow(run_dir: Path, name: str = RECORDED, step: int = 0, failed: bool = False) -> list[str]:
    """Log all there is and close; returns the warnings."""
    warnings: list[str] = []
    follower = Follower(run_dir, name, step, warnings.append)
    assert follower.send() == (not warnings)
    follower.close(failed=failed)
    return warnings


def logged_rows() -> list[tuple[int, dict[str, float]]]:
    """Steps with the numbers that are hard to write down."""
    return [(1, {"reward": 0.5, "eval/pass@4": math.nan}), (2, {"reward": math.inf, "time/step": 2.0})]


def twice(run: Path, name: str) -> None:
    """A run of two steps that was interrupted, goes back to its first and makes three."""
    with MetricsLog(run) as log:
        for step, metrics in logged_rows():
            log.write(step, metrics)
    assert follow(run, name, failed=True) == []
    write(run, 2, 3, after=1, reward=0.25)
    assert follow(run, name, step=1) == []
