"""A run directory holds the metrics, rollouts and evaluations of one branch; when the run leaves a branch, its files move away.

`RUN/left/BRANCH/` keeps the files of a branch from the time when another one began: all of its metrics, and the files of the
steps that the new branch does not share with it. Returning to one of its checkpoints restores them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from kdrl_mcore.monitoring.metrics import METRICS_FILE, keep_rows

LEFT = "left"
BY_STEP = ("rollouts", "evaluation")
"""Folders with an entry for each step, `step_NNNNNN`."""
WHOLE = ("hf", "tensorboard", "loggers")
"""Folders that belong to one branch: the export, the curves, which are redrawn from the metrics, and the runs of logging
services."""
_STEP = re.compile(r"step_(\d{6,})(?:\.jsonl)?")


def begin_branch(run_dir: Path, left: str, shared: int | None, source: str | None, step: int) -> bool:
    """Begin a new branch: move away the files that only the branch being left has, and restore those up to `step` of the branch
    from which the new one begins.

    Args:
        left: the branch being left.
        shared: the last step that the new branch shares with it; None if there is none.
        source: the branch whose checkpoint the new one begins from; None if it begins with the first step or from a checkpoint
            of another run directory.
        step: the step of that checkpoint.

    Returns:
        Whether anything moved.
    """
    kept = run_dir / LEFT / (left or "first")
    last = -1 if shared is None else shared
    moved = _move(run_dir, kept, lambda number: number > last)
    metrics = run_dir / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(metrics, kept / METRICS_FILE)
        keep_rows(metrics, last)
        moved = True
    for name in WHOLE:
        if (run_dir / name).is_dir():
            kept.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(kept / name, ignore_errors=True)
            os.replace(run_dir / name, kept / name)
            moved = True
    if source is not None and step > last:
        _restore(run_dir, run_dir / LEFT / (source or "first"), step)
    return moved


def drop_after(run_dir: Path, step: int) -> None:
    """Remove rollouts and evaluations of the steps after `step`, which will be repeated."""
    for entry in _entries(run_dir):
        if _number(entry) > step:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _restore(run_dir: Path, kept: Path, step: int) -> None:
    if (kept / METRICS_FILE).is_file():
        shutil.copyfile(kept / METRICS_FILE, run_dir / METRICS_FILE)
        keep_rows(run_dir / METRICS_FILE, step)
        _move(kept, run_dir, lambda number: number <= step)


def _move(source: Path, target: Path, wanted: Callable[[int], bool]) -> bool:
    moved = False
    for entry in _entries(source):
        if wanted(_number(entry)):
            moved_to = target / entry.parent.name / entry.name
            moved_to.parent.mkdir(parents=True, exist_ok=True)
            if moved_to.is_dir():
                shutil.rmtree(moved_to)
            os.replace(entry, moved_to)
            moved = True
    return moved


def _entries(folder: Path) -> list[Path]:
    return [entry for name in BY_STEP for entry in sorted((folder / name).glob("step_*")) if _STEP.fullmatch(entry.name)]


def _number(entry: Path) -> int:
    matched = _STEP.fullmatch(entry.name)
    assert matched is not None
    return int(matched[1])
