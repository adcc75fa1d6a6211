"""Submit the unfinished runs of studies as SLURM job arrays: one element per run, started by `slurm/experiments.sh`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdrl_mcore.config import slurm_dir
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.studies.local import is_finished
from kdrl_mcore.studies.study import StudyRun

LISTS = ".slurm"
"""A folder next to the runs. Its file `JOB` has a line for each element of that job array: the run's identity, `train` or
`plan`, and its overrides."""


def submit(runs: Sequence[StudyRun], options: str = "") -> Iterator[str]:
    """Submit the runs that are neither finished nor queued, one array for each number of nodes; yields a line for each.

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
        # Hold the job until its list is named by the job's number, by which the elements find it.
        command = ["sbatch", "--parsable", "--hold", f"--nodes={nodes}", f"--array=0-{len(array) - 1}", *shlex.split(options)]
        job = _run([*command, str(slurm_dir() / "experiments.sh"), str(folder.resolve())]).strip().split(";")[0]
        unnamed.rename(folder / job)
        _run(["scontrol", "release", job])
        yield f"job {job}: {len(array)} runs on {nodes} node{'s' * (nodes > 1)} each; when it is done, collect with --collect"


def _line(run: StudyRun) -> str:
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
    # A user's settings for squeue (SQUEUE_STATES, ...) could hide elements of the queue.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    if (slurm_dir().parent / "__init__.py").is_file():  # installed: there is no .venv next to the script
        environment.setdefault("KDRL_PYTHON", sys.executable)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise KdrlError(f"{command[0]} is not installed: --slurm works on a machine that can submit SLURM jobs") from error
    if done.returncode:
        raise KdrlError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout
