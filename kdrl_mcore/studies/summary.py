"""Statistics: one number for a whole run, with an interval. For several runs that differ in the seed the interval is over the
seeds; for a single run it is over the problems or prompts it was measured on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, stdev

from scipy.special import stdtrit

FINAL_STEPS = 5
"""The final value of a training metric is its mean over this many last steps."""
NORMAL_975 = 1.960
"""The 97.5 % point of the normal distribution."""

Rows = Sequence[Mapping[str, float]]
"""The metrics of a run, as `read_metrics` returns them."""
Value = Callable[[Rows], float | None]
"""One number of a run; None if it has no such number."""
Ends = Callable[[Rows], tuple[float, float] | None]
"""The ends of the 95 % interval of one number of a single run; None if the run does not have them."""


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval, if it has one.

    Attributes:
        mean: the mean over runs that differ in the seed, or the number of a single run.
        low, high: the ends.
        seeds: the number of runs. For several, the interval is Student's t over their numbers; for one, it is over the problems
            or prompts the run was measured on, and says nothing about other seeds.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1

    def text(self, form: Callable[[float], str]) -> str:
        """`61.2 ± 1.3` over seeds, `61.2 [58.9, 63.5]` for one run, with numbers formatted by `form`; only the number if there
        is no interval, or no difference between the seeds."""
        if self.low is None or self.high is None or (self.seeds > 1 and self.low == self.high):
            return form(self.mean)
        if self.seeds > 1:
            return f"{form(self.mean)} ± {form(self.high - self.mean)}"
        return f"{form(self.mean)} [{form(self.low)}, {form(self.high)}]"


def t_interval(values: Iterable[float]) -> Interval | None:
    """Mean and 95 % interval over seeds; None without values."""
    values = list(values)
    if len(values) < 2:
        return Interval(values[0]) if values else None
    mean, half = fmean(values), stdtrit(len(values) - 1, 0.975) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def curve(rows: Rows, metric: str) -> tuple[list[int], list[float]]:
    """The steps with a finite value of the metric, and the values."""
    points = [(int(row["step"]), value) for row in rows if math.isfinite(value := row.get(metric, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _newest(rows: Rows, metric: str, count: int) -> tuple[list[int], list[float]]:
    """The newest points of a curve, without reading all steps of a long run."""
    having = (row for row in reversed(rows) if math.isfinite(row.get(metric, math.nan)))
    return curve(list(islice(having, count))[::-1], metric)


def last(metric: str) -> Value:
    """The newest value."""
    return lambda rows: values[-1] if (values := _newest(rows, metric, 1)[1]) else None


def at_start(metric: str) -> Value:
    """The value before training, at step 0; None if it was not measured then."""
    return lambda rows: next(iter(curve(rows[:1], metric)[1]), None) if rows and rows[0]["step"] == 0 else None


def final(metric: str) -> Value:
    """Mean over the last `FINAL_STEPS` steps."""
    return lambda rows: fmean(values) if (values := _newest(rows, metric, FINAL_STEPS)[1]) else None


def total(metric: str) -> Value:
    """Sum over the run."""
    return lambda rows: sum(values) if (values := curve(rows, metric)[1]) else None


def mean(metric: str) -> Value:
    """Mean over the run."""
    return lambda rows: fmean(values) if (values := curve(rows, metric)[1]) else None


def saved_share(rows: Rows) -> float | None:
    """Share of response tokens that the teacher did not have to score; None for a run that never used it."""
    asked, saved = total("teacher_tokens")(rows), total("teacher_tokens_saved")(rows)
    return saved / (asked + saved) if asked and saved is not None else None


def percent(value: float) -> str:
    """`61.2%`"""
    return f"{value:.1%}"


def decimals(count: int) -> Callable[[float], str]:
    """A format with this many decimals and thousands separators."""
    return lambda value: f"{value:,.{count}f}"


def measured_ends(value: Callable[[str], Value], metric: str) -> Ends:
    """The ends that the evaluation wrote along with the value, by bootstrap over the held-out problems."""
    low, high = value(f"{metric}_low"), value(f"{metric}_high")

    def ends(rows: Rows) -> tuple[float, float] | None:
        pair = low(rows), high(rows)
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])

    return ends


def final_ends(metric: str) -> Ends:
    """The ends of `final`, from the standard errors (clustered by prompt) of the steps that it averages."""

    def ends(rows: Rows) -> tuple[float, float] | None:
        (steps, values), (error_steps, errors) = (_newest(rows, name, FINAL_STEPS) for name in (metric, f"{metric}_stderr"))
        if not values or steps != error_steps:
            return None
        half = NORMAL_975 * math.hypot(*errors) / len(errors)
        return fmean(values) - half, fmean(values) + half

    return ends


@dataclass(frozen=True)
class Statistic:
    """A column of results.

    Attributes:
        key, title: its name in files and on the page.
        of, ends: the number of a run, and its interval for a single run.
        form: formats a number.
        is_key: whether it is one of the few most important columns.
    """

    key: str
    title: str
    of: Value
    form: Callable[[float], str]
    is_key: bool = False
    ends: Ends = lambda rows: None

    def over(self, runs: Iterable[Rows]) -> Interval | None:
        """The number for the runs of one configuration, with the t interval over their seeds, or a single run's own interval;
        None if no run has the number."""
        having = [(value, rows) for rows in runs if (value := self.of(rows)) is not None]
        if len(having) == 1:
            value, rows = having[0]
            return Interval(value, *(self.ends(rows) or ()))
        return t_interval(value for value, _ in having)


STATISTICS: tuple[Statistic, ...] = (
    Statistic("accuracy", "accuracy", last("eval/accuracy"), percent, is_key=True, ends=measured_ends(last, "eval/accuracy")),
    Statistic(
        "accuracy_at_start", "at start", at_start("eval/accuracy"), percent, ends=measured_ends(at_start, "eval/accuracy")
    ),
    Statistic(
        "greedy_accuracy",
        "greedy",
        last("eval/greedy_accuracy"),
        percent,
        is_key=True,
        ends=measured_ends(last, "eval/greedy_accuracy"),
    ),
    Statistic("response_length", "length", last("eval/response_length"), decimals(1), is_key=True),
    Statistic("reward", "reward", final("reward"), decimals(3), ends=final_ends("reward")),
    Statistic("kl", "KL", final("kl"), decimals(3), is_key=True),
    Statistic("entropy", "entropy", final("entropy"), decimals(3)),
    Statistic("samples", "samples", total("samples"), decimals(0)),
    Statistic("teacher_tokens", "teacher tokens", total("teacher_tokens"), decimals(0), is_key=True),
    Statistic("teacher_saved", "saved", saved_share, percent),
    Statistic("seconds_per_step", "s/step", mean("time/step"), decimals(2)),
)
"""Accuracy, greedy and length are held out; reward, KL and entropy are means over the last `FINAL_STEPS` steps."""
_OF_BENCHMARK = re.compile(r"eval/(.+)/avg@\d+")


def benchmark_statistics(runs: Iterable[Rows]) -> list[Statistic]:
    """Held-out accuracy by benchmark, where runs were evaluated on several: `accuracy` is the mean over them."""
    names = dict.fromkeys(name for rows in runs for row in rows for name in row if _OF_BENCHMARK.fullmatch(name))
    found = [
        Statistic(f"accuracy/{match[1]}", match[1], last(name), percent, is_key=True, ends=measured_ends(last, name))
        for name in names
        if (match := _OF_BENCHMARK.fullmatch(name))
    ]
    return found if len(found) > 1 else []


def equal_time_statistics(runs: Iterable[Rows]) -> list[Statistic]:
    """Held-out accuracy at equal training time, if runs were evaluated during training: from the last evaluation within the
    time (the sum of `time/step`, without evaluations and checkpoints) that the fastest run took."""
    runs = list(runs)
    trained = [seconds for rows in runs if (seconds := total("time/step")(rows))]
    during_training = any(0 < step < rows[-1]["step"] for rows in runs for step in curve(rows, "eval/accuracy")[0])
    if not trained or not during_training:
        return []
    limit = min(trained) * (1 + 1e-9)  # the fastest run's own last evaluation counts, however its sum is rounded

    def of(rows: Rows) -> float | None:
        found, seconds = None, 0.0
        for row in rows:
            seconds += row.get("time/step", 0.0)
            if seconds > limit:
                break
            found = row.get("eval/accuracy", found)
        return found

    return [Statistic("accuracy_at_equal_time", f"within {limit:.0f} s", of, percent, is_key=True)]


HOW_INTERVALS_ARE_MADE = (
    "Several seeds: mean ± half of the 95 % t interval over the seeds. A single run: [low, high], its own 95 % interval, which "
    "says nothing about other seeds: for held-out accuracies by bootstrap over the problems (all responses to a problem are "
    "one draw), for the reward from the standard errors of its steps, clustered by prompt."
)
