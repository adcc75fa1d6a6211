"""Submitting the missing runs of studies as SLURM job arrays: one element a run, started by `slurm/experiments.sh`."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.experiments.local import is_finished
from kdrl_mcore.experiments.study import Run

SCRIPT = Path("slurm/experiments.sh")
LISTS = ".slurm"
"""Folder beside the runs: `JOB` holds a line for each element of the array with that number: identity, what to do with the
run (train or plan), its overrides."""


def submit(runs: Sequence[Run], options: str = "") -> Iterator[str]:
    """Submit what is neither finished nor in the queue, an array for each number of nodes; yields a line on each.

    Raises:
        KdrlError: sbatch or squeue failed.
    """
    queued = {run for root in {run.root for run in runs} for run in _queued(root / LISTS)}
    wanted = [run for run in runs if not is_finished(run) and run.identity not in queued]
    yield f"{len(runs)} runs: {sum(map(is_finished, runs))} finished, {len(wanted)} to submit, the rest in the queue"
    for root, nodes in sorted({(run.root, run.nodes) for run in wanted}):
        array = [run for run in wanted if (run.root, run.nodes) == (root, nodes)]
        folder = root / LISTS
        folder.mkdir(parents=True, exist_ok=True)
        unnamed = folder / "new"
        unnamed.write_text("".join(_line(run) for run in array))
        # Held until the list has the job's number for its name, by which the elements find it.
        command = ["sbatch", "--parsable", "--hold", f"--nodes={nodes}", f"--array=0-{len(array) - 1}", *shlex.split(options)]
        job = _run([*command, str(SCRIPT), str(folder.resolve())]).strip().split(";")[0]
        unnamed.rename(folder / job)
        _run(["scontrol", "release", job])
        yield f"job {job}: {len(array)} runs on {nodes} node{'s' * (nodes > 1)} each; when it is done, collect with --collect"


def _line(run: Run) -> str:
    return shlex.join([run.identity, "plan" if run.planned else "train", *run.overrides, f"run.dir={run.directory}"]) + "\n"


def _queued(folder: Path) -> set[str]:
    """Identities of the runs that are in SLURM's queue."""
    lists = {file.name: file.read_text().splitlines() for file in folder.glob("[0-9]*")}
    if not lists:
        return set()
    found = _run(["squeue", "--noheader", "--array", "--me", "--format=%F %K"])
    pairs = [line.split() for line in found.splitlines()]
    return {lists[job][int(element)].split()[0] for job, element in pairs if job in lists and element.isdigit()}


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise KdrlError(f"{command[0]} is not there: --slurm works on a machine that can submit SLURM jobs") from error
    if done.returncode:
        raise KdrlError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout
