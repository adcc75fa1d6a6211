"""Compare runs: a table in the terminal, and curves as a picture or a self-contained page.

python tools/report.py RUN [RUN ...] --output report.html      (or .png)

Runs named NAME_seed1, NAME_seed2, ... are one entry: their mean, with the range.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdrl_mcore.errors import ConfigError, DataError, KdrlError
from kdrl_mcore.monitoring.metrics import read_metrics

FINAL_STEPS = 5
"""A final value (reward, KL, length) is the mean over this many last steps."""
SMOOTHING_STEPS = 5
"""Training curves show each step faintly, and the mean over this many steps as the line."""
COLOURS = ("#0b6e99", "#d9730d", "#5b8c3e", "#9b3d6e", "#6b5bb0", "#8a6d3b", "#c03f3f", "#4a4a4a")
SEED_SUFFIX = re.compile(r"_seed\d+$")
SMALLEST_BETA = 1e-4
"""Below this the log axis of beta goes on linearly to zero."""
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Accuracy (line with dots: held out)", ("accuracy", "eval/accuracy"), True),
    ("Reward", ("reward",), False),
    ("KL to the teacher (nats per token)", ("kl",), False),
    ("Coefficient of distillation, beta (log scale)", ("beta",), False),
    ("Response length (tokens)", ("response_length",), False),
    ("Entropy of the student (nats per token)", ("entropy",), False),
)
"""Title, metrics, and whether the axis is in per cent."""


@dataclass(frozen=True)
class Run:
    """A run's name and its metrics, one dict a step."""

    name: str
    rows: list[dict[str, float]]

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """The steps that have the metric with a finite value, and the values."""
        points = [(int(row["step"]), row[metric]) for row in self.rows if math.isfinite(row.get(metric, math.nan))]
        return [step for step, _ in points], [value for _, value in points]

    def final(self, metric: str) -> float | None:
        """Mean over the last steps that have the metric; None where none has."""
        values = self.curve(metric)[1][-FINAL_STEPS:]
        return fmean(values) if values else None

    def total(self, metric: str) -> float | None:
        """Sum over the run; None where no step has the metric."""
        values = self.curve(metric)[1]
        return sum(values) if values else None

    def mean(self, metric: str) -> float | None:
        """Mean over the run; None where no step has the metric."""
        values = self.curve(metric)[1]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Entry:
    """What the report shows as one: a run, or the runs of one method that differ in the seed."""

    name: str
    runs: list[Run]

    def curve(self, metric: str) -> tuple[list[int], list[list[float]]]:
        """The steps at which every run has the metric, and each run's values there."""
        curves = [dict(zip(*run.curve(metric), strict=True)) for run in self.runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        return steps, [[curve[step] for step in steps] for curve in curves]

    def measure(self, of: Callable[[Run], float | None]) -> list[float]:
        """The number of each run that has it."""
        return [value for run in self.runs if (value := of(run)) is not None]


def by_seed(runs: Sequence[Run]) -> list[Entry]:
    """One entry for all runs whose names differ only in the number behind `_seed`, and for each other run; in order."""
    entries: dict[str, list[Run]] = {}
    for run in runs:
        entries.setdefault(SEED_SUFFIX.sub("", run.name), []).append(run)
    return [Entry(name if len(group) > 1 else group[0].name, group) for name, group in entries.items()]


def main() -> int:
    """Read the runs, print the table, write the picture or page; exit code 1 or 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description="Compare runs: a table in the terminal, and curves in a file.")
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory (run.dir of the training); NAME_seed1, NAME_seed2, ... are averaged",
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write: .html (table and curves) or .png (curves)")
    arguments = parser.parse_args()
    try:
        make_report(arguments.runs, arguments.output, Console())
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_report(run_dirs: Sequence[Path], output: Path, console: Console) -> None:
    """Print the table of the runs to `console` and write their curves to `output` (.html or .png).

    Raises:
        DataError: a run does not exist or has no metrics, or `output` cannot be written.
        ConfigError: `output` has another ending.
    """
    if output.suffix not in (".html", ".png"):
        raise ConfigError(f"--output {output}: name a file that ends in .html or .png")
    runs = [Run(name, read_metrics(run_dir)) for name, run_dir in zip(run_names(run_dirs), run_dirs, strict=True)]
    entries = by_seed(runs)
    table = summary(entries)
    _print_table(table, console)
    picture = _png(plot(entries))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(picture if output.suffix == ".png" else page(table, picture).encode())
    except OSError as error:
        raise DataError(f"--output {output}: cannot be written ({error.strerror}); name another place") from error
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole path where that would not tell two runs apart."""
    last = [run_dir.resolve().name for run_dir in run_dirs]
    return [name if last.count(name) == 1 else str(run_dir) for name, run_dir in zip(last, run_dirs, strict=True)]


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def summary(entries: Sequence[Entry]) -> list[list[str]]:
    """The comparison as text: a header row, then a row for each entry. "-" stands where it has no such number."""
    columns: list[tuple[str, Callable[[Run], float | None], Callable[[float], str]]] = [
        ("accuracy at start", lambda run: _held_out(run, "accuracy", 0), _percent),
        ("at end", lambda run: _held_out(run, "accuracy", -1), _percent),
        ("gain, points", _gain, lambda value: f"{value:+.1f}"),
        ("greedy at start", lambda run: _held_out(run, "greedy_accuracy", 0), _percent),
        ("greedy at end", lambda run: _held_out(run, "greedy_accuracy", -1), _percent),
        ("reward", lambda run: run.final("reward"), _number(3)),
        ("KL", lambda run: run.final("kl"), _number(4)),
        ("length", lambda run: run.final("response_length"), _number(1)),
        ("samples", lambda run: run.total("samples"), _number(0)),
        ("teacher tokens", lambda run: run.total("teacher_tokens"), _number(0)),
        ("saved", _saved_share, _percent),
        ("s/step", lambda run: run.mean("time/step"), _number(2)),
    ]
    header = ["run", *(title for title, _, _ in columns)]
    body = [[entry.name, *(_cell(entry.measure(measure), form) for _, measure, form in columns)] for entry in entries]
    return [header, *body]


def _cell(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, and behind it the range where the runs differ in what is shown."""
    if not values:
        return "-"
    low, high = form(min(values)), form(max(values))
    return form(fmean(values)) if low == high else f"{form(fmean(values))} ({low} to {high})"


def _held_out(run: Run, metric: str, index: int) -> float | None:
    values = run.curve(f"eval/{metric}")[1]
    return values[index] if values else None


def _gain(run: Run) -> float | None:
    values = run.curve("eval/accuracy")[1]
    return 100 * (values[-1] - values[0]) if len(values) > 1 else None


def _saved_share(run: Run) -> float | None:
    """Share of the response tokens that the mask kept from the teacher; None for a run that never asked its teacher."""
    asked, saved = run.total("teacher_tokens"), run.total("teacher_tokens_saved")
    return saved / (asked + saved) if asked and saved is not None else None


def _print_table(rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print it turned round, a column for each run, so that it fits a narrow terminal."""
    table = Table(caption=f"Accuracy is held out; reward, KL and length are means over the last {FINAL_STEPS} steps.")
    table.add_column(Text(rows[0][0]))
    for row in rows[1:]:
        table.add_column(Text(row[0]), justify="right", overflow="fold")
    for measure in zip(*(row[1:] for row in rows), strict=True):
        table.add_row(*measure)
    console.print(table)


def plot(entries: Sequence[Entry]) -> Figure:
    """Small multiples of curves against training steps, one colour an entry."""
    style: dict[Any, Any] = {
        "font.size": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.grid": True,
        "grid.color": "#e8e8e8",
        "axes.titlesize": 11.0,
        "axes.titlelocation": "left",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        for axis, (title, metrics, is_share) in zip(axes.flat, PANELS, strict=True):
            axis.set_title(title)
            for index, entry in enumerate(entries):
                for metric in metrics:
                    _draw(axis, entry, metric, COLOURS[index % len(COLOURS)])
            _finish_axis(axis, is_share)
            if metrics == ("beta",) and axis.lines:
                axis.set_yscale("symlog", linthresh=SMALLEST_BETA, linscale=0.3)
                axis.set_ylim(-SMALLEST_BETA / 2, 2 * max(axis.get_ylim()[1], SMALLEST_BETA))
                axis.yaxis.set_major_formatter("{x:g}")
        for axis in axes[-1]:
            axis.set_xlabel("training step")
        handles = [
            plt.Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=_label(entry))
            for i, entry in enumerate(entries)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(entries), 4), frameon=False, fontsize=12)
    return figure


def _label(entry: Entry) -> str:
    return entry.name if len(entry.runs) == 1 else f"{entry.name} (mean and range of {len(entry.runs)} seeds)"


def _draw(axis: Axes, entry: Entry, metric: str, colour: str) -> None:
    steps, values = entry.curve(metric)
    if not steps:
        return
    mean = [fmean(column) for column in zip(*values, strict=True)]
    if metric.startswith("eval/"):
        low, high = ([extreme(column) for column in zip(*values, strict=True)] for extreme in (min, max))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(steps, mean, color=colour, linewidth=2.2, marker="o", markersize=5)
        return
    is_schedule = metric == "beta"
    with_eval = metric == "accuracy" and len(entry.curve("eval/accuracy")[0]) > 1
    for run in values:
        axis.plot(steps, run, color=colour, linewidth=0.8, alpha=0.3)
    if not with_eval:
        axis.plot(steps, mean if is_schedule else _smooth(mean), color=colour, linewidth=2.0)


def _finish_axis(axis: Axes, is_share: bool) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not axis.lines:
        axis.text(0.5, 0.5, "no run has this", transform=axis.transAxes, ha="center", va="center", color="#999999")
        axis.set_yticks([])
    elif is_share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif axis.get_ylim()[0] > 0:
        axis.set_ylim(bottom=0)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over the last `SMOOTHING_STEPS` values at each point (fewer at the start)."""
    return [fmean(values[max(0, end - SMOOTHING_STEPS) : end]) for end in range(1, len(values) + 1)]


def _png(figure: Figure) -> bytes:
    """The figure as PNG, in 64 colours: a third of the size, and nothing that one could see is lost."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def page(table: Sequence[Sequence[str]], picture: bytes) -> str:
    """A self-contained HTML page: the table and the picture inside it."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table[0])
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table[1:])
    names = html.escape(", ".join(row[0] for row in table[1:]))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>KDRL runs: {names}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .4rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ width: 100%; margin-top: 1.5rem; }}
div {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>KDRL runs</h1>
<div><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<p>Accuracy is held out; reward, KL and length are means over the last {FINAL_STEPS} steps.</p>
<img alt="Curves of the runs against training steps" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
