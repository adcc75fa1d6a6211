"""Comparisons within a study: what a setting gains over another, paired by seed, and the best choice on an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtr

from kdrl_mcore.errors import ConfigError
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.studies.local import is_finished
from kdrl_mcore.studies.study import StudyRun
from kdrl_mcore.studies.summary import Interval, Statistic, t_interval

Setting = tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """A setting minus the one it is compared with.

    Attributes:
        setting: the choice on each axis.
        interval: the mean of the differences between runs with the same seed, with its 95 % t interval.
        p: the two-sided p-value of the paired t test; None for a single seed.
        adjusted_p: Holm's, over all differences that have one: at a threshold of 0.05, the probability that any difference
            of the table is called significant by chance is at most 0.05.
    """

    setting: Setting
    interval: Interval
    p: float | None = None
    adjusted_p: float | None = None


def values_of(runs: Sequence[StudyRun], statistic: Statistic) -> dict[Setting, dict[int, float]]:
    """A statistic of every finished run that has it, by setting and seed."""
    found: dict[Setting, dict[int, float]] = {}
    for run in runs:
        if is_finished(run) and (value := statistic.of(read_metrics(run.directory))) is not None:
            found.setdefault(run.setting, {})[run.seed] = value
    return found


def differences(runs: Sequence[StudyRun], axis: str, choice: str, statistic: Statistic) -> list[Difference]:
    """Every setting compared with the one that has `choice` on `axis` and is otherwise the same, over the seeds of both.

    Raises:
        ConfigError: the study has no such axis or choice.
    """
    position = _axis(runs, axis)
    if choice not in {run.setting[position] for run in runs}:
        raise ConfigError(f"the axis {axis} of {runs[0].study} has no choice '{choice}'")
    values = values_of(runs, statistic)
    found = []
    for setting, by_seed in values.items():
        baseline = values.get((*setting[:position], choice, *setting[position + 1 :]), {})
        gains = [value - baseline[seed] for seed, value in by_seed.items() if seed in baseline]
        interval = t_interval(gains)
        if setting[position] != choice and interval is not None:
            found.append(Difference(setting, interval, paired_p(gains)))
    adjusted = iter(holm([each.p for each in found if each.p is not None]))
    return [Difference(d.setting, d.interval, d.p, None if d.p is None else next(adjusted)) for d in found]


def paired_p(gains: Sequence[float]) -> float | None:
    """The two-sided p-value of Student's t test of a mean of zero; None for fewer than two numbers."""
    if len(gains) < 2:
        return None
    mean, error = fmean(gains), stdev(gains) / math.sqrt(len(gains))
    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(len(gains) - 1, -abs(mean / error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def best_choices(runs: Sequence[StudyRun], axis: str, statistic: Statistic) -> dict[Setting, tuple[str, float, int]]:
    """For each choice on the other axes, the choice on `axis` with the highest mean over seeds (of equal ones the first), that
    mean, and the number of seeds. Only choices with the most finished seeds compete.

    Raises:
        ConfigError: the study has no such axis.
    """
    position = _axis(runs, axis)
    found: dict[Setting, tuple[str, float, int]] = {}
    for setting, by_seed in values_of(runs, statistic).items():
        others, mean, seeds = (*setting[:position], *setting[position + 1 :]), fmean(by_seed.values()), len(by_seed)
        if others not in found or (seeds, mean) > (found[others][2], found[others][1]):
            found[others] = (setting[position], mean, seeds)
    return found


def _axis(runs: Sequence[StudyRun], axis: str) -> int:
    if axis not in runs[0].axes:
        raise ConfigError(f"{runs[0].study} has no axis '{axis}'; its axes are: {', '.join(runs[0].axes)}")
    return runs[0].axes.index(axis)


def difference_table(found: Sequence[Difference], axes: Sequence[str], statistic: Statistic) -> list[list[str]]:
    """A header, and a row for each difference."""
    rows = [
        [
            *each.setting,
            str(each.interval.seeds),
            each.interval.text(statistic.form),
            *("-" if p is None else f"{p:.2g}" for p in (each.p, each.adjusted_p)),
        ]
        for each in found
    ]
    return [[*axes, "seeds", f"gain in {statistic.title}", "p", "p (Holm)"], *rows]
