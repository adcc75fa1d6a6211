"""What is told of a whole run in one number, and of runs that differ in the seed in an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

FINAL_STEPS = 5
"""A final value of a training metric is its mean over this many last steps."""
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % points of Student's t for 1 to 30 degrees of freedom; above, the normal's 1.960 is within 4 %."""

Rows = Sequence[Mapping[str, float]]
"""The metrics of a run, as `read_metrics` gives them."""
Value = Callable[[Rows], float | None]
"""One number of a run; None where it has no such number."""


@dataclass(frozen=True)
class Interval:
    """A mean over runs, and half the width of its 95 % t interval (None for a single run)."""

    mean: float
    half_width: float | None

    def text(self, form: Callable[[float], str]) -> str:
        """`61.2 ± 1.3`, by the form of each number; without the interval where there is none, or no difference."""
        return form(self.mean) if not self.half_width else f"{form(self.mean)} ± {form(self.half_width)}"


def t_interval(values: Iterable[float]) -> Interval | None:
    """Mean and 95 % interval over seeds; None without values."""
    values = list(values)
    if len(values) < 2:
        return Interval(values[0], None) if values else None
    freedom = len(values) - 1
    point = _T_975[freedom - 1] if freedom <= len(_T_975) else 1.960
    return Interval(fmean(values), point * stdev(values) / math.sqrt(len(values)))


def curve(rows: Rows, metric: str) -> tuple[list[int], list[float]]:
    """The steps that have the metric with a finite value, and the values."""
    points = [(int(row["step"]), row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def last(metric: str) -> Value:
    """The newest value."""
    return lambda rows: values[-1] if (values := curve(rows, metric)[1]) else None


def first(metric: str) -> Value:
    """The oldest value, where there is a newer one."""
    return lambda rows: values[0] if len(values := curve(rows, metric)[1]) > 1 else None


def final(metric: str) -> Value:
    """Mean over the last `FINAL_STEPS` steps."""
    return lambda rows: fmean(values[-FINAL_STEPS:]) if (values := curve(rows, metric)[1]) else None


def total(metric: str) -> Value:
    """Sum over the run."""
    return lambda rows: sum(values) if (values := curve(rows, metric)[1]) else None


def mean(metric: str) -> Value:
    """Mean over the run."""
    return lambda rows: fmean(values) if (values := curve(rows, metric)[1]) else None


def saved_share(rows: Rows) -> float | None:
    """Share of the response tokens kept from the teacher; None for a run that never asked it."""
    asked, saved = total("teacher_tokens")(rows), total("teacher_tokens_saved")(rows)
    return saved / (asked + saved) if asked and saved is not None else None


def percent(value: float) -> str:
    """`61.2%`"""
    return f"{value:.1%}"


def decimals(count: int) -> Callable[[float], str]:
    """A number with so many decimals, its thousands apart."""
    return lambda value: f"{value:,.{count}f}"


@dataclass(frozen=True)
class Measure:
    """A column of results: key, title, the number of a run, how it is written, and whether it is one of the few that matter
    most."""

    key: str
    title: str
    of: Value
    form: Callable[[float], str]
    is_key: bool = False


MEASURES: tuple[Measure, ...] = (
    Measure("accuracy", "accuracy", last("eval/accuracy"), percent, True),
    Measure("accuracy_at_start", "at start", first("eval/accuracy"), percent),
    Measure("greedy_accuracy", "greedy", last("eval/greedy_accuracy"), percent, True),
    Measure("response_length", "length", last("eval/response_length"), decimals(1), True),
    Measure("reward", "reward", final("reward"), decimals(3)),
    Measure("kl", "KL", final("kl"), decimals(3), True),
    Measure("entropy", "entropy", final("entropy"), decimals(3)),
    Measure("samples", "samples", total("samples"), decimals(0)),
    Measure("teacher_tokens", "teacher tokens", total("teacher_tokens"), decimals(0), True),
    Measure("teacher_saved", "saved", saved_share, percent),
    Measure("seconds_per_step", "s/step", mean("time/step"), decimals(2)),
)
"""Accuracy, greedy and length are held out; reward, KL and entropy are means over the last `FINAL_STEPS` steps."""
