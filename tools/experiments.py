"""Run the studies of `conf/experiments/` and collect them.

    python tools/experiments.py conf/experiments/main.yaml [FILE ...] [--jobs N | --slurm | --collect] [key=value ...]

Finished runs are skipped and interrupted ones go on, so the same command is started again until all is there. Studies that hold
the same configuration share the run. `key=value` is `base=NAME` (the pair: a file in `conf/experiments/base/`), `seeds=[1,2]`,
`root=DIR`, a key of the base file, or an override of every run. Writes STUDY.csv (a line a run), STUDY.md and accuracy.png
into ROOT. A study with `planned: true` (scaling.yaml) trains nothing: its runs are planned (docs/planning.md), and its picture
is images/STUDY.png.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.experiments import scaling
from kdrl_mcore.experiments.local import Outcome, is_finished, run_missing
from kdrl_mcore.experiments.planned import plan_missing
from kdrl_mcore.experiments.results import finished_by_setting, intervals, markdown, replace_file, table, write_csv
from kdrl_mcore.experiments.slurm import submit
from kdrl_mcore.experiments.study import Run, load_study
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.monitoring.summary import MEASURES
from kdrl_mcore.reporting.picture import intervals_picture


# Hydra's own --multirun was considered: its launchers run every combination anew, so nothing is shared, skipped or resumed.
def main() -> int:
    """Run, collect and print; 0 when all is finished (or submitted), 1 where a run is missing, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="FILE|key=value", help="study files, and what to set in all of them")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine (default: %(default)s)")
    how.add_argument("--slurm", action="store_true", help="submit what is missing as job arrays; collect later with --collect")
    how.add_argument("--collect", action="store_true", help="run nothing: collect what is finished")
    parser.add_argument(
        "--sbatch", default="", metavar="'OPTIONS'", help="further options of sbatch, such as '--partition=gpu'"
    )
    arguments = parser.parse_intermixed_args()
    files = [Path(word) for word in arguments.words if "=" not in word]
    settings = [word for word in arguments.words if "=" in word]
    if not files:
        parser.error("name a study file, such as conf/experiments/main.yaml")
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        studies = {file: load_study(file, settings) for file in files}
        runs = distinct(itertools.chain(*studies.values()))
        if arguments.slurm:
            for line in submit(runs, arguments.sbatch):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            return 0
        outcomes, complete = list[Outcome](), True
        if not arguments.collect:
            outcomes, complete = run_all(runs, arguments.jobs, console)
        collect({file.stem: study for file, study in studies.items() if not study[0].planned}, console)
        for file, study in studies.items():
            if study[0].planned:
                collect_plans(file, study, console)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return conclude(runs, outcomes, complete, console)


def distinct(runs: Iterable[Run]) -> list[Run]:
    """One run of each identity, by the name of the first study that has it; all with the first seed come first."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.identity, run)
    return sorted(found.values(), key=lambda run: run.seed)


def run_all(runs: Sequence[Run], jobs: int, console: Console) -> tuple[list[Outcome], bool]:
    """Train or plan what is missing, a line for each run that ends; returns the outcomes, and whether nothing asked to stop."""
    missing = [run for run in runs if not is_finished(run)]
    outcomes: list[Outcome] = []
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before")

    def show(outcome: Outcome) -> None:
        outcomes.append(outcome)
        text = outcome.message
        if outcome.status == "finished" and not outcome.run.planned:
            rows = read_metrics(outcome.run.directory)
            accuracy = MEASURES[0].of(rows)
            text = "" if accuracy is None else f"accuracy {MEASURES[0].form(accuracy)}"
            ended = [each.seconds for each in outcomes if each.status == "finished"]
            left = sum(ended) / len(ended) * (len(missing) - len(outcomes)) / jobs
            text += f", {outcome.seconds:.0f} s, about {left / 60:.0f} min left"
        line = f"{len(outcomes):>3}/{len(missing)} {outcome.run.name}: {outcome.status} {text}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    complete = plan_missing([run for run in missing if run.planned], jobs, show)
    return outcomes, complete and run_missing([run for run in missing if not run.planned], jobs, show)


def collect(studies: Mapping[str, Sequence[Run]], console: Console) -> None:
    """Write each study's results beside its runs, and a picture of the accuracies of all of them; print the tables."""
    if not studies:
        return
    panels = {}
    root = next(iter(studies.values()))[0].root
    for study, runs in studies.items():
        settings = finished_by_setting(runs)
        rows, panels[study] = table(settings), intervals(settings, MEASURES[0])
        write_csv(runs, root / f"{study}.csv")
        replace_file(root / f"{study}.md", markdown(rows).encode())
        console.print(_shown(f"{study}: mean and 95 % t interval over seeds", rows))
    replace_file(root / "accuracy.png", intervals_picture("held-out accuracy", panels))
    console.print(f"wrote STUDY.csv, STUDY.md and accuracy.png in {root}", markup=False, highlight=False, soft_wrap=True)


def collect_plans(file: Path, runs: Sequence[Run], console: Console) -> None:
    """Write a planned study's results into its root, and print its table."""
    root, points = runs[0].root, scaling.collect_points(runs)
    replace_file(root / f"{file.stem}.csv", scaling.csv_of(runs))
    if not points:
        console.print(f"{file.stem}: no run is planned yet that fits", markup=False, highlight=False)
        return
    rows, picture = scaling.table(points), f"images/{file.stem}.png"
    replace_file(root / picture, scaling.picture_of(points))
    replace_file(root / f"{file.stem}.md", scaling.page(points, runs, file, picture, markdown(rows)).encode())
    console.print(_shown(f"{file.stem}: planned, not measured", rows))
    console.print(
        f"wrote {file.stem}.csv, {file.stem}.md and {picture} in {root}", markup=False, highlight=False, soft_wrap=True
    )


def _shown(title: str, rows: Sequence[Sequence[str]]) -> Table:
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(rows[0]):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows[1:]:
        shown.add_row(*row)
    return shown


def conclude(runs: Sequence[Run], outcomes: Sequence[Outcome], complete: bool, console: Console) -> int:
    """Name what is missing; the exit code."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(f"error: {outcome.run.name} failed, {outcome.message} (in {outcome.run.directory})", file=sys.stderr)
    missing = sum(not is_finished(run) for run in runs) - len(failed)
    if missing:
        cause = "not finished" if complete else "not finished, as it was asked to stop"
        console.print(f"{missing} of {len(runs)} runs are {cause}: start the same command again to go on", soft_wrap=True)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
