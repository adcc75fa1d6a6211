"""The report as one self-contained HTML page: the numbers as JSON inside `page.html`, which draws them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_mcore.monitoring.summary import FINAL_STEPS, MEASURES, curve, t_interval
from kdrl_mcore.reporting.rollouts import sample_rollouts
from kdrl_mcore.reporting.runs import Group, Run, differences

TEMPLATE = Path(__file__).with_name("page.html")
CURVES: tuple[tuple[str, str, str], ...] = (
    ("accuracy", "Accuracy (dots: held out)", "%"),
    ("reward", "Reward", ""),
    ("kl", "KL to the teacher", "nats/token"),
    ("beta", "Coefficient of distillation, beta", ""),
    ("response_length", "Response length", "tokens"),
    ("entropy", "Entropy of the student", "nats/token"),
    ("teacher_saved", "Tokens kept from the teacher", "%"),
    ("truncated", "Responses cut off", "%"),
    ("grad_norm", "Gradient norm", ""),
    ("loss", "Loss", ""),
    ("time/step", "Time of a step", "s"),
)
"""Key, title and unit of each panel."""
PHASES = ("rollout", "reward", "teacher", "train")
MAX_POINTS, MAX_TOKENS = 250_000, 60_000
"""Points of all curves and response tokens of all rollouts in one page: together under some megabytes."""


def write_page(groups: Sequence[Group], reload_seconds: float | None = None) -> str:
    """The page. With `reload_seconds` it says that the runs are live, and reloads itself."""
    data = json.dumps(page_data(groups, reload_seconds), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # In a script element only "<" can end or open anything.
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data.replace("<", "\\u003c"))


def page_data(groups: Sequence[Group], reload_seconds: float | None = None) -> dict[str, Any]:
    """Everything the page shows, ready for JSON."""
    runs = [run for group in groups for run in group.runs]
    points = max(40, MAX_POINTS // (len(runs) * (len(CURVES) + 1)))
    with_rollouts = [group for group in groups if any((group.runs[0].directory / "rollouts").glob("step_*.jsonl"))]
    tokens = MAX_TOKENS // max(1, len(with_rollouts))
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "reload": reload_seconds,
        "final_steps": FINAL_STEPS,
        "curves": [{"key": key, "title": title, "unit": unit} for key, title, unit in CURVES],
        "groups": [_group(group, points) for group in groups],
        "table": _table(groups),
        "alerts": [
            {"run": run.name, "step": step, "name": alert.name, "message": alert.message}
            for run in runs
            for step, alert in run.alerts()
        ],
        "differences": [{"key": key, "values": list(map(_word, values))} for key, values in differences(groups).items()],
        "rollouts": [
            {"group": group.name, "run": group.runs[0].name, "prompts": sample_rollouts(group.runs[0], tokens)}
            for group in with_rollouts
        ],
    }


def _group(group: Group, points: int) -> dict[str, Any]:
    return {
        "name": group.name,
        "runs": [
            {
                "name": run.name,
                "step": int(run.rows[-1]["step"]),
                "steps": run.steps,
                "curves": {key: _thin(*_curve(run, key), points) for key, _, _ in CURVES},
                "held_out": _thin(*curve(run.rows, "eval/accuracy"), points),
            }
            for run in group.runs
        ],
        "phases": _phases(group),
    }


def _curve(run: Run, key: str) -> tuple[list[int], list[float]]:
    if key != "teacher_saved":
        return curve(run.rows, key)
    steps, saved = curve(run.rows, "teacher_tokens_saved")
    asked = curve(run.rows, "teacher_tokens")[1]
    return steps, [s / (s + a) if s + a else 0.0 for s, a in zip(saved, asked, strict=True)] if any(asked) else []


def _thin(steps: list[int], values: list[float], points: int) -> list[list[float]]:
    """At most about that many points, evenly, the last among them; values to four digits. [] without values."""
    if not values:
        return []
    stride = math.ceil(len(values) / points)
    kept = range((len(values) - 1) % stride, len(values), stride)
    return [[steps[i] for i in kept], [float(f"{values[i]:.4g}") for i in kept]]


def _phases(group: Group) -> dict[str, float]:
    """Mean seconds of a step in each phase, over the steps of all its runs; what no phase names is `other`."""
    means = {
        phase: t_interval([value for run in group.runs for value in curve(run.rows, f"time/{phase}")[1]])
        for phase in (*PHASES, "step")
    }
    seconds = {phase: interval.mean for phase, interval in means.items() if interval is not None}
    step = seconds.pop("step", 0.0)
    return {
        phase: float(f"{value:.4g}") for phase, value in {**seconds, "other": max(0.0, step - sum(seconds.values()))}.items()
    }


def _table(groups: Sequence[Group]) -> dict[str, Any]:
    columns = []
    for measure in MEASURES:
        values = [[v for run in group.runs if (v := measure.of(run.rows)) is not None] for group in groups]
        intervals = [t_interval(each) for each in values]
        if any(interval is not None for interval in intervals):
            cells = [
                None
                if interval is None
                else {
                    "mean": interval.mean,
                    "half": interval.half_width,
                    "text": interval.text(measure.form),
                    "values": [measure.form(value) for value in each],
                }
                for interval, each in zip(intervals, values, strict=True)
            ]
            columns.append({"key": measure.key, "title": measure.title, "cells": cells})
    return {"seeds": [len(group.runs) for group in groups], "columns": columns}


def _word(value: Any) -> str:
    return "-" if value is None else str(value)
