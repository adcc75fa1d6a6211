"""The results of studies: a CSV file with a row per run, and a table with a row per setting and intervals over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdrl_mcore.errors import DataError
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.resilience.files import write_file
from kdrl_mcore.studies.local import is_finished
from kdrl_mcore.studies.study import StudyRun
from kdrl_mcore.studies.summary import STATISTICS, Interval, Rows, Statistic, benchmark_statistics, equal_time_statistics


def write_csv(runs: Sequence[StudyRun], path: Path) -> None:
    """Write one line per run, with empty statistics for unfinished ones. The file is replaced atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = [read_metrics(run.directory) if is_finished(run) else [] for run in runs]
    measures = [*STATISTICS, *_statistics_of(metrics)]
    writer.writerow(["study", "setting", "seed", "finished", *(measure.key for measure in measures), "directory"])
    for run, rows in zip(runs, metrics, strict=True):
        values = [measure.of(rows) for measure in measures]
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        writer.writerow([run.study, " ".join(run.setting), run.seed, bool(rows), *cells, run.directory])
    replace_file(path, text.getvalue().encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        DataError: it cannot be written.
    """
    try:
        write_file(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); name another file") from error


def finished_by_setting(runs: Sequence[StudyRun]) -> dict[str, list[Rows]]:
    """The metrics of each setting's finished runs."""
    settings: dict[str, list[Rows]] = {}
    for run in runs:
        finished = settings.setdefault(" ".join(run.setting), [])
        if is_finished(run):
            finished.append(read_metrics(run.directory))
    return settings


def intervals(settings: Mapping[str, Sequence[Rows]], measure: Statistic) -> dict[str, Interval]:
    """A statistic of each setting that has it."""
    found = {setting: measure.over(rows) for setting, rows in settings.items()}
    return {setting: interval for setting, interval in found.items() if interval is not None}


def table(settings: Mapping[str, Sequence[Rows]]) -> list[list[str]]:
    """A header, then for each setting the number of finished seeds and the key statistics with their intervals. The accuracy
    is followed by those of each benchmark, if there are several, and at equal time, if it was measured during training."""
    accuracy, *others = (measure for measure in STATISTICS if measure.is_key)
    columns = [accuracy, *_statistics_of([rows for runs in settings.values() for rows in runs]), *others]
    cells = [intervals(settings, measure) for measure in columns]
    body = [
        [
            setting,
            str(len(rows)),
            *(each[setting].text(c.form) if setting in each else "-" for c, each in zip(columns, cells, strict=True)),
        ]
        for setting, rows in settings.items()
    ]
    return [["setting", "seeds", *(column.title for column in columns)], *body]


def _statistics_of(runs: Sequence[Rows]) -> list[Statistic]:
    """The statistics that depend on what the runs of a study have."""
    return [*benchmark_statistics(runs), *equal_time_statistics(runs)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
