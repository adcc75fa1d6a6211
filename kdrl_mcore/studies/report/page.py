"""The report as one self-contained HTML page: the numbers are JSON inside `page.html`, drawn by `page.js` and `curves.js`. The
tables are also there as plain HTML, for readers without JavaScript."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdrl_mcore.config import load_saved
from kdrl_mcore.monitoring.alerts import DEFAULT_THRESHOLDS, AlertThresholds
from kdrl_mcore.monitoring.drift import alert_thresholds
from kdrl_mcore.studies.report.alerts import faults_of
from kdrl_mcore.studies.report.curves import UNSMOOTHED, Curve, bin_width, default_smoothing, present, run_curves
from kdrl_mcore.studies.report.rollouts import rollout_files, sample_rollouts
from kdrl_mcore.studies.report.runs import Group, RunHistory, differences
from kdrl_mcore.studies.report.static import static_tables
from kdrl_mcore.studies.summary import (
    FINAL_STEPS,
    HOW_INTERVALS_ARE_MADE,
    STATISTICS,
    Statistic,
    curve,
    mean,
    t_interval,
    total,
)

PARTS = {part: Path(__file__).with_name(part) for part in ("page.html", "page.css", "curves.js", "page.js")}
PHASES = ("refit", "rollout", "reward", "teacher", "train")
MAX_POINTS, MAX_TOKENS = 200_000, 60_000
"""Limits for the points of all curves and the response tokens of all rollouts on a page, which keep it to a few megabytes."""


def write_page(groups: Sequence[Group], reload_seconds: float | None = None, notes: Sequence[str] = ()) -> str:
    """The page. With `reload_seconds` it shows that the runs are live, and reloads itself."""
    data = page_data(groups, reload_seconds, notes)
    # Only "<" can end a script element or open anything in it.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    html, css, curves, page = (path.read_text(encoding="utf-8") for path in PARTS.values())
    filled = {
        "/*CSS*/": css,
        "<!--STATIC-->": static_tables(data),
        "/*DATA*/null": text,
        "/*CURVES*/": curves,
        "/*PAGE*/": page,
    }
    return re.sub("|".join(map(re.escape, filled)), lambda found: filled[found[0]], html)


def page_data(groups: Sequence[Group], reload_seconds: float | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON. `notes` are lines to show in addition to those about the runs."""
    runs = [run for group in groups for run in group.runs]
    curves = present(groups)
    points = max(40, MAX_POINTS // (len(runs) * (len(curves) + 1)))
    width = bin_width(runs, points)
    with_rollouts = [group for group in groups if rollout_files(group.runs[0])]
    tokens = MAX_TOKENS // max(1, len(with_rollouts))
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "reload": reload_seconds,
        "final_steps": FINAL_STEPS,
        "intervals": HOW_INTERVALS_ARE_MADE,
        "width": width,
        "smoothing": default_smoothing(max(run.step for run in runs)),
        "curves": [_curve(each) for each in curves],
        "groups": [
            {
                "name": group.name,
                "runs": [_run(run, curves, width, points) for run in group.runs],
                "phases": _phases(group),
            }
            for group in groups
        ],
        "table": _table(groups),
        "notes": [*notes, *_notes(runs)],
        "alerts": [{"run": run.name, **asdict(fault)} for run in runs for fault in faults_of(run.rows, _thresholds(run))],
        "runs": [_record(run, group) for group in groups for run in group.runs],
        "differences": [{"key": key, "values": list(map(_word, values))} for key, values in differences(groups).items()],
        "rollouts": [
            {"group": group.name, "run": group.runs[0].name, "prompts": prompts}
            for group in with_rollouts
            if (prompts := sample_rollouts(group.runs[0], tokens))
        ],
    }


def _thresholds(run: RunHistory) -> AlertThresholds:
    return alert_thresholds(load_saved(run.config)) if run.config else DEFAULT_THRESHOLDS


def _curve(each: Curve) -> dict[str, Any]:
    return {
        "key": each.key, "title": each.title, "unit": each.unit, "family": each.family, "held_out": each.is_held_out,
        "smooth": not each.is_held_out and each.key not in UNSMOOTHED,
    }  # fmt: skip


def _run(run: RunHistory, curves: Sequence[Curve], width: int, points: int) -> dict[str, Any]:
    return {"name": run.name, "step": run.step, "steps": run.steps, **run_curves(run, curves, width, points)}


def _phases(group: Group) -> dict[str, float]:
    """Mean seconds per step in each phase, over all runs. Time outside the phases is `other`, and evaluations are averaged over
    all steps."""
    averages = {
        phase: t_interval(value for run in group.runs if (value := mean(f"time/{phase}")(run.rows)) is not None)
        for phase in (*PHASES, "step")
    }
    seconds = {phase: interval.mean for phase, interval in averages.items() if interval is not None}
    step = seconds.pop("step", 0.0)
    seconds["other"] = max(0.0, step - sum(seconds.values()))
    evaluation = [total("time/evaluation")(run.rows) or 0.0 for run in group.runs]
    steps = sum(max(1, run.step) for run in group.runs)
    seconds |= {"evaluation": sum(evaluation) / steps} if any(evaluation) else {}
    return {phase: float(f"{value:.4g}") for phase, value in seconds.items()}


def _table(groups: Sequence[Group]) -> dict[str, Any]:
    columns = []
    for measure in STATISTICS:
        intervals = [measure.over(run.rows for run in group.runs) for group in groups]
        if any(interval is not None for interval in intervals):
            cells = [
                None
                if interval is None
                else {
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "text": interval.text(measure.form),
                    "seeds": [measure.form(value) for value in _each_seed(measure, group)],
                }
                for interval, group in zip(intervals, groups, strict=True)
            ]
            columns.append({"key": measure.key, "title": measure.title, "cells": cells})
    return {"seeds": [len(group.runs) for group in groups], "columns": columns}


def _each_seed(measure: Statistic, group: Group) -> list[float]:
    """The numbers behind an interval over seeds; none for a single run."""
    runs = group.runs if len(group.runs) > 1 else []
    return [value for run in runs if (value := measure.of(run.rows)) is not None]


def _notes(runs: Sequence[RunHistory]) -> list[str]:
    """What a reader must know before comparing the runs, one line each."""
    notes = [f"{run.name}: {line}" for run in runs for line in run.damage]
    if unfinished := [f"{run.name} (step {run.step} of {run.steps})" for run in runs if not run.is_done]:
        notes.append(f"Not finished, so their numbers are those so far: {', '.join(unfinished)}.")
    evaluated = [(run, steps[-1]) for run in runs if (steps := curve(run.rows, "eval/accuracy")[0])]
    if earlier := [f"{run.name} (step {step} of {run.step} trained)" for run, step in evaluated if step < run.step]:
        notes.append(f"Evaluated before their newest step: {', '.join(earlier)}.")
    return notes


def _record(run: RunHistory, group: Group) -> dict[str, Any]:
    """The progress of a run, its time and tokens, and each of its recorded starts."""
    return {
        "run": run.name,
        "group": group.name,
        "progress": f"{run.step} of {run.steps}",
        "seconds": (total("time/step")(run.rows) or 0.0) + (total("time/evaluation")(run.rows) or 0.0),
        "tokens": total("tokens")(run.rows),
        "starts": [asdict(start) | {"versions": start.all_versions} for start in run.starts],
    }


def _word(value: Any) -> str:
    return "-" if value is None else str(value)
