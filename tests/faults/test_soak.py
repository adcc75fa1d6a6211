"""A bad night: a hundred steps with a fault every twenty, restarted as SLURM would, end as if nothing had happened."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from kdrl_mcore.errors import HANG_EXIT_CODE
from tests.support import resuming
from tests.support.launching import Ended, Launcher
from tests.support.training import steps_of

STEPS = 100
RANKS = 2
NAN = "fault.kind=nan fault.rank=1 fault.step=91 fault.phase=train"
STARTS = (
    "fault.kind=kill fault.rank=1 fault.step=10 fault.phase=train",
    "fault.kind=hang fault.rank=0 fault.step=30 fault.phase=reward",
    "fault.kind=stop fault.rank=1 fault.step=50 fault.phase=rollout",  # a preemption
    "fault.kind=full_disk fault.rank=1 fault.step=72 fault.phase=checkpoint",
    NAN,  # the uninterrupted run has it too
)


def began_after(ended: Ended) -> int:
    """The step of the checkpoint from which a start resumed."""
    found = re.search(r"resumed from \S+ after step (\d+)", ended.output)
    return int(found.group(1)) if found else 0


@pytest.mark.timeout(600)
def test_a_hundred_steps_with_a_fault_every_twenty_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    job = [*resuming.make_job(tmp_path), f"trainer.steps={STEPS}", "parallel.tensor=2"]
    job += ["checkpoint.every=4", "checkpoint.asynchronous=false"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    done = attempts = 0  # steps; attempts include those begun and not completed
    with Launcher() as launcher:
        ended = []
        longest = 10.0  # seconds of the longest start so far: now, no healthy rank here is that long without progress
        for number, fault in enumerate(STARTS):
            began = time.monotonic()
            overrides = [*job, f"run.dir={run}", *fault.split()]
            if "hang" in fault:
                overrides.append(f"trainer.hang_timeout={longest}")
            ended.append(launcher.train(RANKS, overrides, tmp_path / f"start{number}.log"))
            longest = max(longest, time.monotonic() - began)
            done = steps_of(run)[-1]["step"]
            attempts += done - began_after(ended[-1]) + ("kill" in fault or "hang" in fault)
        uninterrupted = launcher.train(
            RANKS, [*job, f"run.dir={whole}", "checkpoint.every=0", *NAN.split()], tmp_path / "whole.log"
        )
    killed, hung, stopped, full, last = ended
    assert killed.codes[1] == -signal.SIGKILL and killed.codes[0] != 0
    assert hung.codes == [HANG_EXIT_CODE] * RANKS and "rank 0 on" in hung.output and "hangs in step 30, reward" in hung.output
    assert stopped.codes == [0] * RANKS and f"after step 50 of {STEPS}" in stopped.output
    assert full.codes == [1] * RANKS and "error: the checkpoint of step 72 could not be written" in full.output
    assert last.codes == uninterrupted.codes == [0] * RANKS, last.output
    assert [began_after(each) for each in ended] == [0, 8, 28, 50, 68]

    assert [row["step"] for row in steps_of(run)] == list(range(1, STEPS + 1))
    assert steps_of(run) == steps_of(whole)
    assert [resuming.tokens(run, step) for step in range(1, STEPS + 1)] == [
        resuming.tokens(whole, step) for step in range(1, STEPS + 1)
    ]
    assert (run / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()
    skipped = sum(row["skipped_updates"] for row in steps_of(run))
    assert (done, skipped) == (STEPS, 1)
    assert (done - skipped) / attempts >= 0.9, attempts
