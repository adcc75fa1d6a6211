"""The results of studies: one row a run in a CSV file, one row a setting with intervals over seeds in a table."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdrl_mcore.errors import DataError
from kdrl_mcore.experiments.local import is_finished
from kdrl_mcore.experiments.study import Run
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.monitoring.summary import MEASURES, Interval, Measure, Rows, t_interval


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
    replace_file(path, text.getvalue().encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and move it into place.

    Raises:
        DataError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); name another place") from error


def finished_by_setting(runs: Sequence[Run]) -> dict[str, list[Rows]]:
    """The metrics of each setting's finished runs."""
    settings: dict[str, list[Rows]] = {}
    for run in runs:
        finished = settings.setdefault(" ".join(run.setting), [])
        if is_finished(run):
            finished.append(read_metrics(run.directory))
    return settings


def intervals(settings: Mapping[str, Sequence[Rows]], measure: Measure) -> dict[str, Interval]:
    """A measure of each setting that has it."""
    found = {setting: t_interval(v for r in rows if (v := measure.of(r)) is not None) for setting, rows in settings.items()}
    return {setting: interval for setting, interval in found.items() if interval is not None}


def table(settings: Mapping[str, Sequence[Rows]]) -> list[list[str]]:
    """A header, then for each setting the number of finished seeds and the key measures with their intervals."""
    columns = [measure for measure in MEASURES if measure.is_key]
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


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
