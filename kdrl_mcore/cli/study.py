"""Run studies (grids of runs) and collect their results.

    kdrl-study main [NAME|FILE ...] [--jobs N | --slurm | --collect] [--only AXIS=CHOICE,...] [key=value ...]

A study is a YAML file: your own, or one of the package's, by name (`conf/study/` in a checkout). Finished runs are skipped and
interrupted ones resume, so repeat the command until every run is finished. Studies with the same configuration share the run.
`key=value` is `base=NAME` (a pair: a file in the folder `base` next to the study), `seeds=[1,2]`, `root=DIR`, a key of the base
file, or an override for every run. The results are STUDY.csv (one line per run), STUDY.md and accuracy.png in ROOT. A study
with `planned: true` (scaling.yaml) trains nothing: its runs are planned (docs/planning.md), and its picture is
images/STUDY.png.

`--only task=sparse,sums` restricts an axis to some of its choices (repeat it for another axis).
`--against method=grpo` compares every setting with the one that has grpo as its method and is otherwise the same: the mean of
the differences between runs with the same seed, its 95 % interval, and p-values with Holm's correction (STUDY_against_grpo.md).
`--best value` writes the choice on an axis that has the highest mean accuracy, for each choice on the other axes, as a YAML
mapping (STUDY_best.yaml).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.studies import scaling
from kdrl_mcore.studies.comparison import best_choices, difference_table, differences
from kdrl_mcore.studies.local import Outcome, is_finished, run_missing
from kdrl_mcore.studies.planned import plan_missing
from kdrl_mcore.studies.report.picture import intervals_picture
from kdrl_mcore.studies.results import finished_by_setting, intervals, markdown, replace_file, table, write_csv
from kdrl_mcore.studies.slurm import submit
from kdrl_mcore.studies.study import StudyRun, find_study, load_study
from kdrl_mcore.studies.summary import STATISTICS


# Not Hydra's --multirun: its launchers rerun every combination, so nothing is shared, skipped or resumed.
def main(arguments: list[str]) -> int:
    """Run, collect and print; returns 0 if all runs are finished (or submitted), 1 if a run is missing, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="kdrl-study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="NAME|FILE|key=value", help="studies, and what to set in all of them")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine (default: %(default)s)")
    how.add_argument("--slurm", action="store_true", help="submit what is missing as job arrays; collect later with --collect")
    how.add_argument("--collect", action="store_true", help="run nothing: collect what is finished")
    parser.add_argument(
        "--sbatch", default="", metavar="'OPTIONS'", help="further options of sbatch, such as '--partition=gpu'"
    )
    parser.add_argument(
        "--only", metavar="AXIS=CHOICE,...", action="append", default=[], help="restrict an axis to some of its choices"
    )
    parser.add_argument("--against", metavar="AXIS=CHOICE", help="compare every setting with this choice, paired by seed")
    parser.add_argument("--best", metavar="AXIS", help="write the best choice on this axis for each choice on the others")
    options = parser.parse_intermixed_args(arguments)
    names = [word for word in options.words if "=" not in word]
    settings = [word for word in options.words if "=" in word]
    if not names:
        parser.error("name a study, such as main, or a file")
    if options.against and not all(options.against.partition("=")):
        parser.error("--against needs AXIS=CHOICE, such as method=grpo")
    if not all(all(each.partition("=")) for each in options.only):
        parser.error("--only needs AXIS=CHOICE,..., such as method=grpo,kdrl")
    only = {axis: choices.split(",") for axis, _, choices in (each.partition("=") for each in options.only)}
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        studies = {file: load_study(file, settings, only) for file in map(find_study, names)}
        runs = distinct(itertools.chain(*studies.values()))
        if options.slurm:
            for line in submit(runs, options.sbatch):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            return 0
        outcomes, complete = list[Outcome](), True
        if not options.collect:
            outcomes, complete = run_all(runs, options.jobs, console)
        trained = {file.stem: study for file, study in studies.items() if not study[0].planned}
        collect(trained, console)
        for name, study in trained.items():
            if options.against:
                compare(name, study, options.against, console)
            if options.best:
                choose(name, study, options.best, console)
        for file, study in studies.items():
            if study[0].planned:
                collect_plans(file, study, console)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return conclude(runs, outcomes, complete, console)


def distinct(runs: Iterable[StudyRun]) -> list[StudyRun]:
    """One run for each identity, from the first study that has it, sorted by seed."""
    found: dict[str, StudyRun] = {}
    for run in runs:
        found.setdefault(run.identity, run)
    return sorted(found.values(), key=lambda run: run.seed)


def run_all(runs: Sequence[StudyRun], jobs: int, console: Console) -> tuple[list[Outcome], bool]:
    """Train or plan the missing runs and print a line for each that ends. Returns the outcomes, and False if asked to stop."""
    missing = [run for run in runs if not is_finished(run)]
    outcomes: list[Outcome] = []
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before")

    def show(outcome: Outcome) -> None:
        outcomes.append(outcome)
        text = outcome.message
        if outcome.status == "finished" and not outcome.run.planned:
            rows = read_metrics(outcome.run.directory)
            accuracy = STATISTICS[0].of(rows)
            text = "" if accuracy is None else f"accuracy {STATISTICS[0].form(accuracy)}"
            ended = [each.seconds for each in outcomes if each.status == "finished"]
            left = sum(ended) / len(ended) * (len(missing) - len(outcomes)) / jobs
            text += f", {outcome.seconds:.0f} s, about {left / 60:.0f} min left"
        line = f"{len(outcomes):>3}/{len(missing)} {outcome.run.name}: {outcome.status} {text}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    complete = plan_missing([run for run in missing if run.planned], jobs, show)
    return outcomes, complete and run_missing([run for run in missing if not run.planned], jobs, show)


def collect(studies: Mapping[str, Sequence[StudyRun]], console: Console) -> None:
    """Write each study's results next to its runs, and a picture of all studies' accuracies; print the tables."""
    if not studies:
        return
    panels = {}
    root = next(iter(studies.values()))[0].root
    for study, runs in studies.items():
        settings = finished_by_setting(runs)
        rows, panels[study] = table(settings), intervals(settings, STATISTICS[0])
        write_csv(runs, root / f"{study}.csv")
        replace_file(root / f"{study}.md", markdown(rows).encode())
        console.print(_shown(f"{study}: mean and 95 % t interval over seeds", rows))
    replace_file(root / "accuracy.png", intervals_picture("held-out accuracy", panels))
    console.print(f"wrote STUDY.csv, STUDY.md and accuracy.png in {root}", markup=False, highlight=False, soft_wrap=True)


def compare(study: str, runs: Sequence[StudyRun], against: str, console: Console) -> None:
    """Write and print what every setting gains over the one with this choice (`AXIS=CHOICE`)."""
    axis, _, choice = against.partition("=")
    rows = difference_table(differences(runs, axis, choice, STATISTICS[0]), runs[0].axes, STATISTICS[0])
    path = runs[0].root / f"{study}_against_{choice}.md"
    replace_file(path, markdown(rows).encode())
    console.print(_shown(f"{study}: difference to {against}, paired by seed", rows))
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def choose(study: str, runs: Sequence[StudyRun], axis: str, console: Console) -> None:
    """Write and print the best choice on an axis for each choice on the others."""
    best = best_choices(runs, axis, STATISTICS[0])
    others = [name for name in runs[0].axes if name != axis]
    rows = [[*setting, choice, str(seeds), STATISTICS[0].form(mean)] for setting, (choice, mean, seeds) in best.items()]
    tree = OmegaConf.create()
    for setting, (choice, _, _) in best.items():
        OmegaConf.update(tree, ".".join(setting) or axis, choice)
    path = runs[0].root / f"{study}_best.yaml"
    replace_file(path, OmegaConf.to_yaml(tree).encode())
    console.print(_shown(f"{study}: the best {axis}", [[*others, axis, "seeds", STATISTICS[0].title], *rows]))
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def collect_plans(file: Path, runs: Sequence[StudyRun], console: Console) -> None:
    """Write a planned study's results to its root, and print its table."""
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


def conclude(runs: Sequence[StudyRun], outcomes: Sequence[Outcome], complete: bool, console: Console) -> int:
    """Print the failed runs and the number of missing ones; returns the exit code."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(f"error: {outcome.run.name} failed, {outcome.message} (in {outcome.run.directory})", file=sys.stderr)
    missing = sum(not is_finished(run) for run in runs) - len(failed)
    if missing:
        cause = "not finished" if complete else "not finished, as it was asked to stop"
        console.print(f"{missing} of {len(runs)} runs are {cause}: start the same command again to resume", soft_wrap=True)
    return 1 if failed or missing else 0
