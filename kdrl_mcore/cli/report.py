"""Compare runs: a table in the terminal, and a self-contained page (or the curves as a picture).

    kdrl-report RUN [RUN ...] --output report.html      (or .png)
    kdrl-report RUN [RUN ...] --output report.html --watch     # follow live runs; open the page once

Runs whose configurations differ only in the seed are one entry: mean and 95 % t interval. The interval of a single run is over
the problems on which it was evaluated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.monitoring.metrics import METRICS_FILE
from kdrl_mcore.studies.report.page import write_page
from kdrl_mcore.studies.report.picture import picture
from kdrl_mcore.studies.report.runs import Group, by_configuration, read_runs
from kdrl_mcore.studies.results import replace_file
from kdrl_mcore.studies.summary import FINAL_STEPS, STATISTICS

WATCH_SECONDS = 10.0
FORMATS = (".html", ".png")


def main(arguments: list[str]) -> int:
    """Read the runs, print the table, write the page or picture; returns the exit code, 1 or 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        prog="kdrl-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory (run.dir of the training)")
    parser.add_argument("--output", type=Path, required=True, help="file to write: .html (everything) or .png (curves)")
    parser.add_argument("--main-panels", action="store_true", help=".png: only the six main panels")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"rewrite the page every SECONDS (default: {WATCH_SECONDS:g}) until all runs have reached their last step",
    )
    options = parser.parse_args(arguments)
    try:
        if options.watch is None:
            make_report(options.runs, options.output, Console(), main_panels=options.main_panels)
        else:
            watch(options.runs, options.output, options.watch, Console())
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def make_report(directories: Sequence[Path], output: Path, console: Console, main_panels: bool = False) -> None:
    """Print the comparison and write it to `output`. A run without metrics is left out, with a note.

    Raises:
        ConfigError: `output` is neither .html nor .png.
        DataError: a path is not a run directory, no run has metrics, or the file cannot be written.
    """
    _check_format(output, FORMATS)
    notes = list[str]()
    runs = read_runs(directories, on_left_out=notes.append)
    groups = by_configuration(runs)
    _print_table(groups, console)
    for line in [*notes, *(f"{run.name}: {damage}" for run in runs for damage in run.damage)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    content = write_page(groups, notes=notes).encode() if output.suffix == ".html" else picture(groups, main_panels)
    replace_file(output, content)
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def watch(directories: Sequence[Path], output: Path, seconds: float, console: Console) -> None:
    """Rewrite the page every `seconds` until every run has reached its last step. Runs that have not begun are left out until
    they do. Ctrl-C leaves a page that does not reload itself.

    Raises:
        ConfigError: `output` is not .html, or `seconds` is not positive.
        DataError: no run has metrics, or the file cannot be written.
    """
    _check_format(output, (".html",))
    if seconds <= 0:
        raise ConfigError(f"--watch {seconds:g} must be greater than 0")
    told = False
    while True:
        notes = list[str]()
        begun = [directory for directory in directories if (directory / METRICS_FILE).is_file()]
        runs = read_runs(begun or directories, on_left_out=notes.append)
        live = len(begun) < len(directories) or bool(notes) or not all(run.is_done for run in runs)
        groups = by_configuration(runs)
        replace_file(output, write_page(groups, seconds if live else None, notes).encode())
        if not told:
            console.print(f"wrote {output}; it follows the runs until they end (Ctrl-C stops)", markup=False, soft_wrap=True)
            told = True
        if not live:
            return
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            replace_file(output, write_page(groups, notes=notes).encode())
            raise


def _check_format(output: Path, formats: Sequence[str]) -> None:
    if output.suffix not in formats:
        raise ConfigError(f"--output {output}: name a file that ends in {' or '.join(formats)}")


def _print_table(groups: Sequence[Group], console: Console) -> None:
    """Print the table transposed, with a column for each entry, so that it fits a narrow terminal."""
    table = Table(
        caption="Accuracy, greedy and length are held out; reward, KL and entropy are means over the last "
        f"{FINAL_STEPS} steps. ±: 95 % interval over seeds; [ , ]: of a single run, by the problems or prompts it had."
    )
    table.add_column("")
    for group in groups:
        name = group.name if len(group.runs) == 1 else f"{group.name} ({len(group.runs)} seeds)"
        table.add_column(Text(name), justify="right", overflow="fold")
    for measure in STATISTICS:
        intervals = [measure.over(run.rows for run in group.runs) for group in groups]
        if any(intervals):
            table.add_row(measure.title, *("-" if each is None else each.text(measure.form) for each in intervals))
    console.print(table)
