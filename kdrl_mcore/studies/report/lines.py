"""A curve of one configuration as it is drawn in a picture: its mean and interval at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdrl_mcore.studies.report.curves import UNSMOOTHED, Curve, default_smoothing
from kdrl_mcore.studies.report.runs import Group, RunHistory
from kdrl_mcore.studies.summary import NORMAL_975, curve, t_interval

SAME = 0.003
"""Curves that differ by no more than this share of their range look the same."""
Point = tuple[float, float, float]
"""A value, and the ends of its interval (the value itself if it has none)."""


@dataclass(frozen=True)
class Line:
    """The mean and the ends of the 95 % interval (over the seeds, or a single run's own) at the steps that all runs of a
    configuration have. `each` holds the unsmoothed steps and values of every run."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    each: list[tuple[list[int], list[float]]]
    is_smoothed: bool


def line_of(group: Group, each: Curve) -> Line | None:
    """A group's line; None if its runs have no step with this metric in common."""
    longest = max(run.step for run in group.runs)
    smoothing = 1 if each.is_held_out or each.key in UNSMOOTHED else default_smoothing(longest)
    raw = [_values(run, each) for run in group.runs]
    runs = [_points(run, each, values, smoothing) for run, values in zip(group.runs, raw, strict=True)]
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
        return None
    points = [_over_seeds([run[step] for run in runs]) for step in steps]
    mean, low, high = (list(column) for column in zip(*points, strict=True))
    return Line(steps, mean, low, high, [(list(values), list(values.values())) for values in raw], smoothing > 1)


def _values(run: RunHistory, each: Curve) -> dict[int, float]:
    column = each.column(run.rows).tolist()
    return {int(row["step"]): value for row, value in zip(run.rows, column, strict=True) if not math.isnan(value)}


def _points(run: RunHistory, each: Curve, values: dict[int, float], smoothing: int) -> dict[int, Point]:
    """The mean over the last `smoothing` values at each step (fewer at the start), with its interval."""
    if each.is_held_out:
        lows, highs = (dict(zip(*curve(run.rows, f"{each.key}_{end}"), strict=True)) for end in ("low", "high"))
        return {step: (value, lows.get(step, value), highs.get(step, value)) for step, value in values.items()}
    errors = dict(zip(*curve(run.rows, f"{each.key}_stderr"), strict=True))
    steps, points = list(values), dict[int, Point]()
    for end, step in enumerate(steps, start=1):
        part = steps[max(0, end - smoothing) : end]
        mean = math.fsum(values[at] for at in part) / len(part)
        half = NORMAL_975 * math.hypot(*(errors.get(at, 0.0) for at in part)) / len(part)
        points[step] = mean, mean - half, mean + half
    return points


def _over_seeds(points: Sequence[Point]) -> Point:
    if len(points) == 1:
        return points[0]
    interval = t_interval(value for value, _, _ in points)
    assert interval is not None and interval.low is not None and interval.high is not None
    return interval.mean, interval.low, interval.high


def coinciding(lines: Sequence[Line]) -> list[list[int]]:
    """Which lines look the same: lists of two or more indices into `lines`."""
    values = [value for line in lines for value in line.mean]
    near = SAME * (max(values) - min(values)) if values else 0.0
    classes: list[list[int]] = []
    for index, line in enumerate(lines):
        for members in classes:
            other = lines[members[0]]
            if line.steps == other.steps and all(abs(a - b) <= near for a, b in zip(line.mean, other.mean, strict=True)):
                members.append(index)
                break
        else:
            classes.append([index])
    return [members for members in classes if len(members) > 1]
