"""Run directories whose metrics a logger in this process follows."""

from __future__ import annotations

import math
from pathlib import Path

from kdrl_mcore.config import load_config, save_config
from kdrl_mcore.monitoring.loggers.following import Follower
from kdrl_mcore.monitoring.metrics import MetricsLog

RECORDED = "tests.support.recorded_logger:RecordedLogger"


def new_run(run_dir: Path, *overrides: str) -> Path:
    """A run that has made no step yet."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(load_config(["objective=grpo", f"run.dir={run_dir}", *overrides]), run_dir / "config.yaml")
    write(run_dir)
    return run_dir


def write(run_dir: Path, *steps: int, after: int | None = None, reward: float = 0.0) -> None:
    """Append steps; with `after`, the run first goes back to that step."""
    with MetricsLog(run_dir) as log:
        if after is not None:
            log.truncate_after(after)
        for step in steps:
            log.write(step, {"reward": reward or step / 10})


def follow(run_dir: Path, name: str = RECORDED, step: int = 0, failed: bool = False) -> list[str]:
    """Log everything and close; returns the warnings."""
    warnings: list[str] = []
    follower = Follower(run_dir, name, step, warnings.append)
    assert follower.send() == (not warnings)
    follower.close(failed=failed)
    return warnings


def logged_rows() -> list[tuple[int, dict[str, float]]]:
    """Steps with values that are hard to write: NaN and infinity."""
    return [(1, {"reward": 0.5, "eval/pass@4": math.nan}), (2, {"reward": math.inf, "time/step": 2.0})]


def twice(run: Path, name: str) -> None:
    """A run that is interrupted after two steps, goes back to the first and completes three."""
    with MetricsLog(run) as log:
        for step, metrics in logged_rows():
            log.write(step, metrics)
    assert follow(run, name, failed=True) == []
    write(run, 2, 3, after=1, reward=0.25)
    assert follow(run, name, step=1) == []
