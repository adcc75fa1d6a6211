"""Planned runs: the planner's result for a configuration, in the run directory's `plan.json`; several processes at a time.

python -m kdrl_mcore.studies.planned key=value ... run.dir=DIR       one of them: an element of a SLURM job array
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.config.derived import loaded_teachers, section_of, training_ranks
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.planning.memory import fit_engine
from kdrl_mcore.planning.plan import make_plan
from kdrl_mcore.planning.setup import make_setup, shard_requests
from kdrl_mcore.planning.shards import ShardRequest, find_shape, try_shards
from kdrl_mcore.planning.summary import summarise
from kdrl_mcore.planning.workload import workload_of
from kdrl_mcore.resilience.interrupt import STOP_SIGNALS, StopRequest
from kdrl_mcore.studies.local import PLAN_FILE, SECONDS_BETWEEN_LOOKS, Outcome, is_finished
from kdrl_mcore.studies.results import replace_file
from kdrl_mcore.studies.study import StudyRun


def plan_missing(runs: Sequence[StudyRun], jobs: int, report: Callable[[Outcome], None]) -> bool:
    """Plan every run without a plan, and report each. Each of `jobs` processes works on all runs of one choice on the grid's
    first axis. On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP the current ones are completed.

    Returns:
        Whether it reached the end of the list without being asked to stop.
    """
    missing = [run for run in runs if not is_finished(run)]
    groups = [list(group) for _, group in itertools.groupby(missing, key=lambda run: (run.study, run.setting[0]))]
    workers = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _leave_signals_to_the_parent)
    with workers as pool, StopRequest() as stop:
        waiting: set[Future[list[Outcome]]] = {pool.submit(_plan_runs, group) for group in groups}
        while waiting:
            done, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for future in done:
                for outcome in future.result():
                    report(outcome)
            if stop.received is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                waiting = {future for future in waiting if not future.cancelled()}
    return stop.received is None


def _leave_signals_to_the_parent() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _plan_runs(runs: Sequence[StudyRun]) -> list[Outcome]:
    """Plan these runs in one fake world."""
    configs: dict[StudyRun, Config | KdrlError] = {}
    requests: list[ShardRequest] = []
    for run in runs:
        try:
            config = load_config(run.overrides)
            configs[run] = config
            requests += shard_requests(config, training_ranks(config.cluster)).values()
        except KdrlError as error:
            configs.setdefault(run, error)
    try_shards(requests)
    return [_outcome(run, config) for run, config in configs.items()]


def _outcome(run: StudyRun, config: Config | KdrlError) -> Outcome:
    since = time.monotonic()
    try:
        if isinstance(config, KdrlError):
            raise config
        write_plan(config, run.directory)
    except KdrlError as error:
        return Outcome(run, "failed", time.monotonic() - since, str(error))
    return Outcome(run, "finished", time.monotonic() - since)


def write_plan(config: Config, folder: Path) -> None:
    """Plan a run and write the plan, or the reason if its layout is impossible. Colocated engines use the memory that training
    leaves, at most as much as the configuration allows.

    Raises:
        ConfigError: a model is missing, or the cluster is not described.
    """
    find_shape(config.student.path, "student.path")
    for name, teacher in loaded_teachers(config).items():
        find_shape(teacher.path, f"{section_of(config, name)}.path")
    answer: dict[str, Any]
    try:
        setup = fit_engine(make_setup(config, workload_of(config)))
    except ConfigError as error:
        answer = {"refused": str(error)}
    else:
        answer = summarise(make_plan(setup))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / PLAN_FILE, (json.dumps(answer, indent=1) + "\n").encode())


def main(arguments: list[str]) -> int:
    """Plan one run; returns the exit code."""
    try:
        config = load_config(arguments)
        write_plan(config, Path(config.run.dir))
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
