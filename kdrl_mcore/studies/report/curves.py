"""The report's curves of a run against steps, tokens or time, with few enough points for a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.monitoring.metrics import METRICS
from kdrl_mcore.studies.report.runs import Group, RunHistory
from kdrl_mcore.studies.summary import NORMAL_975, Rows, curve

Column = NDArray[np.float64]
"""A metric in every row of a run; NaN where it is missing or not finite."""

MEMORY = tuple(name for name in METRICS if name.startswith("memory/"))
SHORT_RUN, USUAL_SMOOTHING = 100, 5
"""Curves of runs shorter than `SHORT_RUN` steps are not smoothed; longer ones show the mean over the last `USUAL_SMOOTHING`
steps."""


@dataclass(frozen=True)
class Curve:
    """A panel of the report.

    Attributes:
        key: the metric, or the name of a quantity computed from several.
        title, unit, family: the labels; "%" is a share. Panels of a family are adjacent.
        is_held_out: whether it is measured in some steps only by the evaluation, which also writes the ends of its interval.
        of: computes the quantity; None for the metric itself.
        is_largest: whether a point that stands for several steps shows the largest value instead of the mean.
    """

    key: str
    title: str
    unit: str
    family: str
    is_held_out: bool = False
    of: Callable[[Rows], Column] | None = None
    is_largest: bool = False

    def column(self, rows: Rows) -> Column:
        """The value of each row."""
        return _column(rows, self.key) if self.of is None else self.of(rows)


def _column(rows: Rows, key: str) -> Column:
    values = np.array([row.get(key, math.nan) for row in rows], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def _teacher_saved(rows: Rows) -> Column:
    """Share of the step's response tokens that the teacher did not have to score; NaN for a run that never used it."""
    saved, asked = _column(rows, "teacher_tokens_saved"), _column(rows, "teacher_tokens")
    if not np.nansum(asked):
        return np.full(len(rows), math.nan)
    return _ratio(saved, saved + asked)


def _tokens_per_second(rows: Rows) -> Column:
    return _ratio(_column(rows, "tokens"), _column(rows, "time/step"))


def _memory(rows: Rows) -> Column:
    """The largest value of all phases."""
    columns = np.array([_column(rows, name) for name in MEMORY])
    largest: Column = np.fmax.reduce(columns)
    return largest


def _ratio(part: Column, whole: Column) -> Column:
    return np.divide(part, whole, out=np.full(len(part), math.nan), where=whole > 0)


HELD_OUT, ANSWERS, TEACHING, UPDATES, SPEED = "Held out", "Sampled answers", "Distillation", "Updates", "Speed and memory"
CURVES: tuple[Curve, ...] = (
    Curve("eval/accuracy", "Accuracy, held out", "%", HELD_OUT, is_held_out=True),
    Curve("eval/greedy_accuracy", "Greedy accuracy, held out", "%", HELD_OUT, is_held_out=True),
    Curve("eval/response_length", "Response length, held out", "tokens", HELD_OUT, is_held_out=True),
    Curve("eval/truncated", "Responses cut off, held out", "%", HELD_OUT, is_held_out=True),
    Curve("reward", "Reward", "", ANSWERS),
    Curve("accuracy", "Accuracy", "%", ANSWERS),
    Curve("response_length", "Response length", "tokens", ANSWERS),
    Curve("truncated", "Responses cut off", "%", ANSWERS),
    Curve("signal_share", "Groups with correct and incorrect responses", "%", ANSWERS),
    Curve("entropy", "Entropy of the student", "nats/token", ANSWERS),
    Curve("drift_mean", "Sampler drift, mean", "nats/token", ANSWERS),
    Curve("drift_max", "Sampler drift, largest", "nats", ANSWERS, is_largest=True),
    Curve("kl", "KL to the teacher", "nats/token", TEACHING),
    Curve("beta", "Coefficient of distillation, beta", "", TEACHING),
    Curve("alpha", "Coefficient of the policy loss, alpha", "", TEACHING),
    Curve("teacher_saved", "Tokens kept from the teacher", "%", TEACHING, of=_teacher_saved),
    Curve("distilled_responses", "Responses that are distilled", "%", TEACHING),
    Curve("taught_share", "Tokens that are distilled", "%", TEACHING),
    Curve("gated_share", "Tokens whose advantage the teacher changed", "%", TEACHING),
    Curve("mixed_share", "Distillation over the vocabulary in a mixture", "%", TEACHING),
    Curve("kd_cut_share", "Tokens whose weight pi/mu is cut", "%", TEACHING),
    Curve("kd_importance_ess", "Effective sample size, distillation", "%", TEACHING),
    Curve("grad_norm_policy", "Gradient norm, policy part", "", TEACHING),
    Curve("grad_norm_kd", "Gradient norm, distillation part", "", TEACHING),
    Curve("grad_cosine", "Cosine of the two gradients", "", TEACHING),
    Curve("loss", "Loss", "", UPDATES),
    Curve("grad_norm", "Gradient norm", "", UPDATES),
    Curve("lr", "Learning rate", "", UPDATES),
    Curve("clip_share", "Tokens clipped", "%", UPDATES),
    Curve("corrected_share", "Tokens with a corrected weight", "%", UPDATES),
    Curve("correction_ess", "Effective sample size, policy loss", "%", UPDATES),
    Curve("tokens_per_second", "Tokens per second", "tokens/s", SPEED, of=_tokens_per_second),
    Curve("time/step", "Time of a step", "s", SPEED),
    Curve("time/refit", "Time of a refit", "s", SPEED),
    Curve("time/evaluation", "Time of an evaluation", "s", SPEED, is_held_out=True),
    Curve("time/mfu", "Model FLOP utilization of updates", "%", SPEED),
    Curve("time/tflops", "TFLOP/s of a rank in updates", "", SPEED),
    Curve("memory", "GPU memory of tensors, rank 0", "GiB", SPEED, of=_memory, is_largest=True),
)
"""A panel is drawn if a run has the metric."""
UNSMOOTHED = ("beta", "alpha", "lr")
"""Exact values, not measurements."""
DIGITS = 4


def default_smoothing(steps: int) -> int:
    """The default number of steps over which curves are smoothed; short runs are not smoothed."""
    return 1 if steps < SHORT_RUN else USUAL_SMOOTHING


def bin_width(runs: Sequence[RunHistory], points: int) -> int:
    """The number of steps per point, the same for all runs, so that no curve of the longest run has more than `points`."""
    return math.ceil(max(1, *(run.rows[-1]["step"] for run in runs)) / max(1, points))


def present(groups: Sequence[Group]) -> list[Curve]:
    """The curves that at least one run has."""
    runs = [run for group in groups for run in group.runs]
    found = [each for each in CURVES if any(np.isfinite(each.column(run.rows)).any() for run in runs)]
    place = next((index for index, each in enumerate(found) if each.key == "alpha"), len(found))
    return [*found[:place], *_of_teachers(runs), *found[place:]]


def _of_teachers(runs: Sequence[RunHistory]) -> list[Curve]:
    """The curves of each of several teachers."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if key.startswith("teacher/"))
    names = dict.fromkeys(key.split("/")[1] for key in keys)
    kinds = (
        ("kl", "KL to the teacher {}", "nats/token"),
        ("beta", "beta of the teacher {}", ""),
        ("tokens", "Tokens scored by the teacher {}", "tokens"),
    )
    return [
        Curve(key, title.format(name), unit, TEACHING)
        for kind, title, unit in kinds
        for name in names
        if (key := f"teacher/{name}/{kind}") in keys
    ]


def run_curves(run: RunHistory, curves: Iterable[Curve], width: int, points: int) -> dict[str, Any]:
    """A run's points, ready for JSON.

    Training curves: `y[KEY]` and, if the run has standard errors, `half[KEY]`, half the width of the 95 % interval, at the
    steps `x`; each is the mean over `width` steps (null where a metric is missing). `tokens` and `seconds` are the totals up to
    there. Held-out metrics: `held_out[KEY]` holds steps, values and, if the run has them, the ends of their intervals.
    """
    steps = np.array([row["step"] for row in run.rows])
    bins = np.ceil(steps / width)
    starts = np.flatnonzero(np.diff(bins, prepend=-1.0))
    ends = np.append(starts[1:], len(steps)) - 1
    result: dict[str, Any] = {
        "x": steps[ends].astype(int).tolist(),
        "tokens": _total(run.rows, ("tokens",))[ends].tolist(),
        "seconds": [round(each, 2) for each in _total(run.rows, ("time/step", "time/evaluation"))[ends].tolist()],
        "y": {}, "half": {}, "held_out": {},
    }  # fmt: skip
    for each in curves:
        column = each.column(run.rows)
        if not np.isfinite(column).any():
            continue
        if each.is_held_out:
            result["held_out"][each.key] = _held_out(run.rows, each.key, points)
            continue
        result["y"][each.key] = _rounded(_largest(column, starts) if each.is_largest else _mean(column, starts))
        errors = _column(run.rows, f"{each.key}_stderr")
        if np.isfinite(errors).any():
            counts = np.add.reduceat(np.isfinite(errors).astype(float), starts)
            squares = np.add.reduceat(np.nan_to_num(errors) ** 2, starts)
            result["half"][each.key] = _rounded(NORMAL_975 * _ratio(np.sqrt(squares), counts))
    return result


def _total(rows: Rows, keys: Iterable[str]) -> Column:
    """The cumulative sum of these metrics; missing values count as zero."""
    total: Column = np.cumsum(sum(np.nan_to_num(_column(rows, key)) for key in keys))
    return total


def _held_out(rows: Rows, key: str, points: int) -> list[list[Any]]:
    """At most `points` evaluations, evenly spaced and including the last, with the ends of their intervals if there are any."""
    steps, values = curve(rows, key)
    stride = math.ceil(len(steps) / points)
    kept = range((len(steps) - 1) % stride, len(steps), stride)
    shown: list[list[Any]] = [[steps[i] for i in kept], _rounded([values[i] for i in kept])]
    ends = [dict(zip(*curve(rows, f"{key}_{end}"), strict=True)) for end in ("low", "high")]
    return [*shown, *(_rounded([end.get(steps[i], math.nan) for i in kept]) for end in ends)] if all(ends) else shown


def _mean(column: Column, starts: NDArray[np.intp]) -> Column:
    return _ratio(np.add.reduceat(np.nan_to_num(column), starts), np.add.reduceat(np.isfinite(column).astype(float), starts))


def _largest(column: Column, starts: NDArray[np.intp]) -> Column:
    largest: Column = np.fmax.reduceat(column, starts)
    return largest


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]
