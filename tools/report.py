"""Compare runs: a table in the terminal, and a self-contained page (or the curves as a picture).

    python tools/report.py RUN [RUN ...] --output report.html      (or .png)
    python tools/report.py RUN [RUN ...] --output report.html --watch     # follow live runs; open the page once

Runs whose configuration differs in the seed only are one entry: mean and 95 % t interval.
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
from kdrl_mcore.experiments.results import replace_file
from kdrl_mcore.monitoring.metrics import METRICS_FILE
from kdrl_mcore.monitoring.summary import FINAL_STEPS, MEASURES, t_interval
from kdrl_mcore.reporting.page import write_page
from kdrl_mcore.reporting.picture import picture
from kdrl_mcore.reporting.runs import Group, by_configuration, read_runs

WATCH_SECONDS = 10.0
FORMATS = (".html", ".png")


def main() -> int:
    """Read the runs, print the table, write the page or picture; exit code 1 or 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory (run.dir of the training)")
    parser.add_argument("--output", type=Path, required=True, help="file to write: .html (everything) or .png (curves)")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"write the page anew every so many seconds (default: {WATCH_SECONDS:g}) until all runs are at their last step",
    )
    arguments = parser.parse_args()
    try:
        if arguments.watch is None:
            make_report(arguments.runs, arguments.output, Console())
        else:
            watch(arguments.runs, arguments.output, arguments.watch, Console())
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def make_report(directories: Sequence[Path], output: Path, console: Console) -> None:
    """Print the comparison and write it to `output`.

    Raises:
        ConfigError: `output` is neither .html nor .png.
        DataError: a run directory has no metrics, or the file cannot be written.
    """
    _check_format(output, FORMATS)
    groups = by_configuration(read_runs(directories))
    _print_table(groups, console)
    replace_file(output, write_page(groups).encode() if output.suffix == ".html" else picture(groups))
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def watch(directories: Sequence[Path], output: Path, seconds: float, console: Console) -> None:
    """Write the page every `seconds`, each time whole, until every run has its last step. A run that has yet to begin is left
    out so far. Ctrl-C leaves a page that does not reload itself.

    Raises:
        ConfigError: `output` is not .html, or `seconds` is not positive.
        DataError: a run's metrics are damaged, or the file cannot be written.
    """
    _check_format(output, (".html",))
    if seconds <= 0:
        raise ConfigError(f"--watch {seconds:g} must be greater than 0")
    told = False
    while True:
        begun = [directory for directory in directories if (directory / METRICS_FILE).is_file()]
        runs = read_runs(begun or directories)
        live = len(runs) < len(directories) or not all(run.is_done for run in runs)
        groups = by_configuration(runs)
        replace_file(output, write_page(groups, seconds if live else None).encode())
        if not told:
            console.print(f"wrote {output}; it follows the runs until they end (Ctrl-C stops)", markup=False, soft_wrap=True)
            told = True
        if not live:
            return
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            replace_file(output, write_page(groups).encode())
            raise


def _check_format(output: Path, formats: Sequence[str]) -> None:
    if output.suffix not in formats:
        raise ConfigError(f"--output {output}: name a file that ends in {' or '.join(formats)}")


def _print_table(groups: Sequence[Group], console: Console) -> None:
    """Print it turned round, a column for each entry, so that it fits a narrow terminal."""
    table = Table(
        caption=f"Accuracy, greedy and length are held out; reward, KL and entropy are means over {FINAL_STEPS} steps."
    )
    table.add_column("")
    for group in groups:
        name = group.name if len(group.runs) == 1 else f"{group.name} ({len(group.runs)} seeds)"
        table.add_column(Text(name), justify="right", overflow="fold")
    for measure in MEASURES:
        intervals = [t_interval(v for run in group.runs if (v := measure.of(run.rows)) is not None) for group in groups]
        if any(intervals):
            table.add_row(measure.title, *("-" if each is None else each.text(measure.form) for each in intervals))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
