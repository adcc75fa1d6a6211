"""A run that is asked to stop saves and ends, whatever the signal, whichever process it reaches and whenever it comes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kdrl_mcore.checkpointing.manifest import checksum, files_below, read_manifest
from kdrl_mcore.resilience.interrupt import INTERRUPTED_EXIT_CODE, MOMENT_SECONDS
from tests.reference.tiny_models import read_hf_weights
from tests.support import resuming
from tests.support.launching import Ended, Launcher, Strike
from tests.support.ranks import RankPool
from tests.support.training import metrics_of, train_on_rank

EVERY = 3
"""Steps between checkpoints: one has been written before the signal comes."""


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in metrics_of(run)]


def is_whole(checkpoint: Path) -> bool:
    return checksum(checkpoint, files_below(checkpoint)) == read_manifest(checkpoint)


def check_stopped(ended: Ended, run: Path, name: str) -> int:
    """All ranks ended with code 0, and the step that the last line names is saved. Returns that step."""
    assert set(ended.codes) == {0}, ended.output
    assert "Traceback" not in ended.output and "Warning" not in ended.output, ended.output
    step = steps_of(run)[-1]
    assert ended.output.splitlines()[-1].startswith(f"stopped on {name} after step {step} of "), ended.output
    latest = run / "checkpoints" / "latest"
    assert latest.readlink().name == f"step_{step:06d}" and is_whole(latest.resolve())
    return step


@pytest.mark.parametrize("to", ["group", "leader"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_signal_in_every_form(ranks: int, to: str, launcher: Launcher, tmp_path: Path) -> None:
    """SIGTERM, Ctrl-C and SIGHUP in turn: the same command resumes each time, and no step is lost or done twice."""
    run = tmp_path / "run"
    job = [*resuming.make_job(tmp_path), f"run.dir={run}", "trainer.steps=10000", f"checkpoint.every={EVERY}"]
    job += [f"parallel.tensor={ranks}"]
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        strike = Strike(str(run / "metrics.jsonl"), done + EVERY + 1, number, to)
        own = ranks == 1 and to == "group" and number == signal.SIGTERM  # these processes take seconds to start
        ended = launcher.train(ranks, job, tmp_path / f"{number.name}.log", [strike], own_processes=own)
        assert ended.output.count(f"{number.name}: the run saves and ends") == 1
        step = check_stopped(ended, run, number.name)
        assert step > done + EVERY and steps_of(run) == list(range(1, step + 1))
        done = step


def test_a_second_interrupt_ends_at_once_and_leaves_checkpoints_whole(launcher: Launcher, tmp_path: Path) -> None:
    """One rank hangs; the other waits for it in a collective, where no Python signal handler runs."""
    run = tmp_path / "run"
    job = [*resuming.make_job(tmp_path), f"run.dir={run}", "trainer.steps=100", "checkpoint.every=2", "parallel.tensor=2"]
    job += ["checkpoint.asynchronous=false", "fault.kind=hang", "fault.rank=1", "fault.step=4", "fault.phase=train"]
    first = Strike(str(run / "metrics.jsonl"), 3, signal.SIGINT, "group")
    second = Strike(str(run / "metrics.jsonl"), 3, signal.SIGINT, after=4 * MOMENT_SECONDS)
    ended = launcher.train(2, job, tmp_path / "log", [first, second])
    assert ended.codes == [INTERRUPTED_EXIT_CODE] * 2, ended.output
    assert "Traceback" not in ended.output and ended.output.splitlines()[-1].startswith("interrupted again")
    assert ended.output.count("interrupted again") == 1
    assert is_whole(run / "checkpoints" / "step_000002")


def test_an_error_of_one_rank_is_the_last_line_and_no_other_rank_has_a_traceback(launcher: Launcher, tmp_path: Path) -> None:
    """Only rank 0 cannot write the step's rollouts; rank 1 waits for rank 0 and finds it gone."""
    job = [*resuming.make_job(tmp_path), f"run.dir={tmp_path}/run", "trainer.steps=9", "parallel.tensor=2"]
    job += ["fault.kind=full_disk", "fault.rank=0", "fault.step=2", "fault.phase=logging"]
    ended = launcher.train(2, job, tmp_path / "log")
    assert ended.codes == [1, 1], ended.output
    lines = ended.output.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "cannot write" in lines[-1]
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("phase", ["rollout", "train", "evaluation", "checkpoint"])
def test_one_rank_is_asked_in_any_phase(phase: str, ranks2: RankPool, tmp_path: Path) -> None:
    """All ranks complete the step and save it."""
    job = [
        *resuming.make_job(tmp_path),
        f"run.dir={tmp_path}/run",
        "trainer.steps=9",
        "checkpoint.every=1",
        "eval.at_start=false",
    ]
    if phase == "evaluation":
        job += [f"data.eval={tmp_path}/train.jsonl", "eval.every=2"]
    job += ["fault.kind=stop", "fault.rank=1", "fault.step=2", f"fault.phase={phase}"]
    outcomes = ranks2.run(train_on_rank, job)
    check_stopped(Ended([each.code for each in outcomes], outcomes[0].stderr), tmp_path / "run", "the request of another rank")
    assert steps_of(tmp_path / "run")[-1] == 2


def test_asked_while_the_parts_are_built_a_run_ends_before_it_trains(ranks2: RankPool, tmp_path: Path) -> None:
    job = [*resuming.make_job(tmp_path), f"run.dir={tmp_path}/run", "trainer.steps=9"]
    job += ["fault.kind=stop", "fault.rank=1", "fault.step=0", "fault.phase=load student"]
    outcomes = ranks2.run(train_on_rank, job)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert outcomes[0].stderr.splitlines()[-1].startswith("stopped on the request of another rank before the first step")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_asked_in_the_export_a_run_completes_it(ranks2: RankPool, tmp_path: Path) -> None:
    job = [*resuming.make_job(tmp_path), f"run.dir={tmp_path}/run", "trainer.steps=1"]
    results = ranks2.run(resuming.train, job, resuming.told_to_stop_in_the_export)
    assert [code for code, _ in results] == [0, 0], results
    assert read_hf_weights(tmp_path / "run" / "hf")


def test_a_run_saves_by_the_time_of_rank_0(ranks2: RankPool, tmp_path: Path) -> None:
    """Rank 0's clock says after each step that it is time to save, rank 1's never does; saving changes nothing else."""
    job = [*resuming.make_job(tmp_path), "trainer.steps=3", "checkpoint.keep=0", "checkpoint.every=0"]
    exports = []
    for name, minutes, steps in (("often", 1e-6, [1, 2, 3]), ("off", 0.0, [3]), ("default", 30.0, [3])):
        run = tmp_path / name
        overrides = [*job, f"run.dir={run}", f"checkpoint.every_minutes={minutes}"]
        results = ranks2.run(resuming.train, overrides, partial(resuming.clock_stands_still, 1))
        assert [code for code, _ in results] == [0, 0], results
        found = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
        assert found == [f"step_{step:06d}" for step in steps]
        exports.append({key: weight.numpy().tobytes() for key, weight in read_hf_weights(run / "hf").items()})
    assert exports[0] == exports[1] == exports[2]
