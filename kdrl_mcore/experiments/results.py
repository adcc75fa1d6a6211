"""The results of studies: one row a run in a CSV file, one row a setting with intervals over seeds in a table."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from kdrl_mcore.errors import DataError
from kdrl_mcore.experiments.local import is_finished
from kdrl_mcore.experiments.study import Run
from kdrl_mcore.monitoring.metrics import read_metrics

FINAL_STEPS = 5
"""A final value of a training metric is its mean over this many last steps."""
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % points of Student's t for 1 to 30 degrees of freedom; above, the normal's is within 4 %."""

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    """A mean over runs, and half the width of its 95 % t interval (None for a single run)."""

    mean: float
    half_width: float | None

    def text(self, form: Callable[[float], str]) -> str:
        """`61.2 % ± 1.3 %`, by the form of each number."""
        return form(self.mean) if self.half_width is None else f"{form(self.mean)} ± {form(self.half_width)}"


def t_interval(values: Iterable[float]) -> Interval | None:
    """Mean and 95 % interval over seeds; None without values."""
    values = list(values)
    if not values:
        return None
    if len(values) == 1:
        return Interval(values[0], None)
    point = _T_975[len(values) - 2] if len(values) - 2 < len(_T_975) else 1.96
    return Interval(fmean(values), point * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Measure:
    """A column of results: its key and title, the number of a run's metrics, and how it is written."""

    key: str
    title: str
    of: Callable[[Rows], float | None]
    form: Callable[[float], str]


def series(rows: Rows, metric: str) -> list[float]:
    """The finite values of a metric, in order of steps."""
    return [row[metric] for row in rows if math.isfinite(row.get(metric, math.nan))]


def last(metric: str) -> Callable[[Rows], float | None]:
    """The newest value."""
    return lambda rows: (series(rows, metric) or [None])[-1]  # type: ignore[list-item]


def final(metric: str) -> Callable[[Rows], float | None]:
    """Mean over the last `FINAL_STEPS` steps."""
    return lambda rows: fmean(values) if (values := series(rows, metric)[-FINAL_STEPS:]) else None


def total(metric: str) -> Callable[[Rows], float | None]:
    """Sum over the run."""
    return lambda rows: sum(values) if (values := series(rows, metric)) else None


def mean(metric: str) -> Callable[[Rows], float | None]:
    """Mean over the run."""
    return lambda rows: fmean(values) if (values := series(rows, metric)) else None


def saved_share(rows: Rows) -> float | None:
    """Share of the response tokens kept from the teacher; None for a run that never asked it."""
    asked, saved = total("teacher_tokens")(rows), total("teacher_tokens_saved")(rows)
    return saved / (asked + saved) if asked and saved is not None else None


def percent(value: float) -> str:
    """`61.2 %`"""
    return f"{100 * value:.1f} %"


def number(digits: int) -> Callable[[float], str]:
    """With so many decimals."""
    return lambda value: f"{value:,.{digits}f}"


MEASURES: tuple[Measure, ...] = (
    Measure("accuracy", "accuracy", last("eval/accuracy"), percent),
    Measure("greedy_accuracy", "greedy", last("eval/greedy_accuracy"), percent),
    Measure("response_length", "length", last("eval/response_length"), number(1)),
    Measure("reward", "reward", final("reward"), number(3)),
    Measure("kl", "KL", final("kl"), number(3)),
    Measure("entropy", "entropy", final("entropy"), number(3)),
    Measure("samples", "samples", total("samples"), number(0)),
    Measure("teacher_tokens", "teacher tokens", total("teacher_tokens"), number(0)),
    Measure("teacher_saved", "saved", saved_share, percent),
    Measure("seconds_per_step", "s/step", mean("time/step"), number(2)),
)
"""Accuracy, greedy and length are held out."""


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One line a run, unfinished ones with empty measures; written aside, then moved into place."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "setting", "seed", "finished", *(measure.key for measure in MEASURES), "directory"])
    for run in runs:
        rows = read_metrics(run.directory) if is_finished(run) else []
        values = [measure.of(rows) for measure in MEASURES]
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        writer.writerow([run.study, " ".join(run.setting), run.seed, bool(rows), *cells, run.directory])
    replace_file(path, text.getvalue())


def replace_file(path: Path, text: str) -> None:
    """Write a file aside and move it into place.

    Raises:
        DataError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); name another place") from error


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A header, then for each study and setting the number of finished seeds and each measure with its interval."""
    groups: dict[tuple[str, str], list[Rows]] = {}
    for run in runs:
        finished = groups.setdefault((run.study, " ".join(run.setting)), [])
        if is_finished(run):
            finished.append(read_metrics(run.directory))
    columns = [
        measure for measure in MEASURES if any(measure.of(rows) is not None for group in groups.values() for rows in group)
    ]
    body = []
    for (study, setting), group in groups.items():
        intervals = [t_interval(v for rows in group if (v := measure.of(rows)) is not None) for measure in columns]
        cells = ["-" if each is None else each.text(column.form) for each, column in zip(intervals, columns, strict=True)]
        body.append([study, setting, str(len(group)), *cells])
    return [["study", "setting", "seeds", *(column.title for column in columns)], *body]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
