"""A fault on one rank: the rank that hangs or is slow is named, with the stacks of every rank, and no run ends silently."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from kdrl_mcore.errors import HANG_EXIT_CODE
from kdrl_mcore.resilience.watchdog import Standing, describe_hang, slow_ranks
from tests.support import resuming
from tests.support.launching import Launcher
from tests.support.ranks import RankPool
from tests.support.training import Outcome, train_on_rank

LEAST_TIMEOUT = 8.0


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The run's overrides."""
    return [*resuming.make_job(tmp_path_factory.mktemp("job")), "checkpoint.every=-1"]


@pytest.fixture(scope="module")
def hang_timeout(job: list[str], launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds for which no healthy run is without progress, however busy the machine is: the duration of a whole run right
    now."""
    folder = tmp_path_factory.mktemp("healthy")
    start = time.monotonic()
    ended = launcher.train(2, [*job, "parallel.tensor=2", f"run.dir={folder}/run", "trainer.steps=1"], folder / "log")
    assert ended.codes == [0, 0], ended.output
    return max(LEAST_TIMEOUT, time.monotonic() - start)


@pytest.mark.parametrize(
    ("rank", "step", "phase", "layout"),
    [
        (1, 2, "teacher", "parallel.tensor=2"),
        (0, 2, "train", "parallel.pipeline=2"),
        (1, 2, "reward", "parallel.tensor=1"),
        (1, 0, "load student", "parallel.tensor=2"),
    ],
    ids=["tensor", "pipeline", "data", "loading"],
)
def test_a_hung_rank_is_named_and_every_rank_leaves_its_stacks(
    rank: int, step: int, phase: str, layout: str, job: list[str], hang_timeout: float, launcher: Launcher, tmp_path: Path
) -> None:
    fault = ["fault.kind=hang", f"fault.rank={rank}", f"fault.step={step}", f"fault.phase={phase}"]
    fault.append(f"trainer.hang_timeout={hang_timeout}")
    ended = launcher.train(2, [*job, layout, f"run.dir={tmp_path}/run", "trainer.steps=3", *fault], tmp_path / "log")
    assert ended.codes == [HANG_EXIT_CODE] * 2, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("hang:")]
    assert f"no rank made progress for {hang_timeout:g} s: rank {rank} on " in line
    assert f"hangs in step {step}, {phase}, at " in line and "faults.py:" in line
    assert "1 wait for others" in line and f"rank {1 - rank} on" not in line
    for each in range(2):
        stack = [text for text in ended.output.splitlines() if text.startswith(f"[rank {each}] ")]
        assert any("Thread MainThread" in text for text in stack)
        assert any(f"in {'run_iteration' if step else 'build_job'}" in text for text in stack)


def test_a_rank_that_never_gives_its_interpreter_back_still_leaves_its_stack() -> None:
    """A call into C holds the GIL: the watchdog's thread cannot run, so the C library's timer ends the process."""
    script = (
        "import torch.distributed as dist\n"
        "from kdrl_mcore.resilience.watchdog import Watchdog\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "with Watchdog(timeout=1.0) as watchdog:\n"
        "    while watchdog._total < 0: __import__('time').sleep(0.01)\n"  # until the timer is set
        "    9 ** 9 ** 9\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Timeout (" in done.stderr and 'File "<string>", line 6 in <module>' in done.stderr


def wait_for_a_live_rank(timeout: float, seconds: float) -> bool:
    """On a rank: rank 0 reports progress while the others wait for it in a barrier, all in one phase."""
    import torch.distributed as dist

    from kdrl_mcore.resilience.watchdog import Watchdog

    with Watchdog(timeout, run=10**6) as watchdog:
        watchdog.enter(1, "rollout")
        if dist.get_rank() == 0:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.1)
                watchdog.mark()
        dist.barrier()
        return True


def test_a_phase_may_be_longer_than_the_time_out_while_one_rank_makes_progress(ranks2: RankPool) -> None:
    assert ranks2.run(wait_for_a_live_rank, 5.0, 7.0) == [True, True]


def train_with_a_slow_rank(overrides: list[str]) -> Outcome:
    """On a rank: a run in which `slow` lasts five times as long as the interval since it was last called. The log also has what
    the ranks compared."""
    from kdrl_mcore import trainer
    from kdrl_mcore.resilience import faults, watchdog

    # Only ranks that were seen at work in a phase are compared: so short a run has few samples, and rank 0 may be in none.
    looks = patch.object(watchdog, "SAMPLE_SECONDS", 0.002)
    ended, compared, slow_ranks = 0.0, list[Any](), trainer.slow_ranks

    def compare(own_work: Any, seconds: float) -> Any:
        compared.append((seconds, own_work))
        return slow_ranks(own_work, seconds)

    def sleep(seconds: float) -> None:
        nonlocal ended
        if ended:
            time.sleep(5 * (time.monotonic() - ended))
        ended = time.monotonic()

    with looks, patch.object(faults, "time", SimpleNamespace(sleep=sleep)), patch.object(trainer, "slow_ranks", compare):
        outcome = train_on_rank(overrides)
    outcome.log.append(f"compared: {compared}")
    return outcome


def test_a_slow_rank_is_named_with_its_phase(job: list[str], ranks2: RankPool, tmp_path: Path) -> None:
    """Rank 1 takes longer to begin its rollouts than rank 0 takes for whole steps, however busy the machine is."""
    fault = ["fault.kind=slow", "fault.rank=1", "fault.phase=rollout", "trainer.slow_ranks_every=4"]
    outcomes = ranks2.run(train_with_a_slow_rank, [*job, f"run.dir={tmp_path}/run", "trainer.steps=4", *fault], timeout=600)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    slow = [line for line in outcomes[0].log if "is slow in rollout" in line]
    assert len(slow) == 1 and "step 4: rank 1 on " in slow[0], outcomes[0].log


def test_an_unforeseen_error_on_one_rank_ends_all(job: list[str], launcher: Launcher, tmp_path: Path) -> None:
    fault = ["fault.kind=fail", "fault.rank=1", "fault.step=1", "fault.phase=reward"]
    ended = launcher.train(2, [*job, f"run.dir={tmp_path}/run", "trainer.steps=4", *fault], tmp_path / "log")
    assert all(ended.codes)
    assert "InjectedFault: injected failure: rank 1, step 1, phase reward" in ended.output


WAITING = Standing("alpha", 7, "train", 90, True, "distributed/distributed_c10d.py:1 in all_reduce")


def test_who_hangs() -> None:
    alone = replace(WAITING, host="beta", phase="reward", waits=False, place="reward/pool.py:3 in compare")
    line = describe_hang([WAITING, alone, WAITING], 60)
    assert "rank 1 on beta hangs in step 7, reward, at reward/pool.py:3 in compare; 2 wait for others" in line
    line = describe_hang([WAITING, WAITING, None], 60)
    assert "60 s: rank 2 does not answer; 2 wait for others" in line
    line = describe_hang([WAITING, replace(WAITING, marks=80)], 60)
    assert "every rank waits for another; least progress was made by rank 1 on alpha, in step 7, train" in line


@pytest.mark.parametrize(
    ("own_work", "slow"),
    [
        ([{"train": 5.0}, {"train": 5.5}, {"train": 4.5}], []),
        ([{"train": 5.0}, {"train": 10.0}, {"train": 4.5}], [(1, "train", 10.0, 5.0)]),
        ([{"train": 5.0}, {"train": 10.0}], [(1, "train", 10.0, 5.0)]),
        ([{"train": 0.1}, {"train": 0.4}], []),  # nobody loses time
        ([{"reward": 6.0}, {}, {}, {"reward": 6.5}], []),  # a matter of two ranks
        ([{"logging": 6.0}, {}, {}, {}], []),
        ([{"rollout": 9.0, "train": 3.0}, {"rollout": 3.0, "train": 6.0}], [(0, "rollout", 9.0, 3.0), (1, "train", 6.0, 3.0)]),
    ],
)
def test_who_is_slow(own_work: list[dict[str, float]], slow: list[tuple[int, str, float, float]]) -> None:
    assert slow_ranks(own_work, seconds=20.0) == slow
