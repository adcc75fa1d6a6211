"""Hangs and slow ranks as NCCL's flight recorder shows them, from dumps in its format and from real dumps of gloo's
recorder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import pytest

from kdrl_mcore.errors import HANG_EXIT_CODE
from kdrl_mcore.resilience.flight_recorder import Recorded, not_come, ranks_of_groups, recorded, seconds_in_collectives
from kdrl_mcore.resilience.watchdog import Standing, _read_standing, describe_hang, slow_ranks
from tests.support import ROOT
from tests.support.flight_records import SECOND, dump, entry
from tests.support.ranks import RankPool

GROUPS = {"0": [0, 1, 2, 3], "7": [2, 3]}


def stands(*entries: dict[str, Any]) -> Recorded:
    return recorded(dump(*entries), GROUPS)


def test_what_a_rank_waits_in() -> None:
    assert stands() == Recorded()
    waiting = stands(entry(5, "0", 9), entry(6, "0", 10, "started"), entry(7, "7", 3, "scheduled"))
    assert waiting == Recorded({"0": 10, "7": 3}, {"0": (10, [0, 1, 2, 3])})
    # A kernel that has not started waits for earlier work on its own GPU, not for other ranks.
    assert stands(entry(6, "0", 10, "scheduled")).waits_in == {}
    # A send or a receive waits for some rank of the group.
    sent = stands(entry(6, "7", 10, "started", is_p2p=True, profiling_name="nccl:send 0->1"))
    assert sent == Recorded({"7": 0}, {"7": (0, [2, 3])})


def standing(known: Recorded, marks: int = 50) -> Standing:
    """A rank whose main thread is in `.item()`, which says nothing."""
    place = "kdrl_mcore/student/student.py:7 in update"
    text = json.dumps(asdict(Standing("alpha", 3, "train", marks, bool(known.waits_in), place, known)))
    return _read_standing(text.encode())


def test_a_hang_on_cuda_names_the_rank_whose_gpu_does_not_wait() -> None:
    waiting = stands(entry(6, "0", 10, "started"))
    behind = stands(entry(6, "0", 9))
    busy = stands(entry(5, "0", 9), entry(6, "0", 10, "scheduled"))
    for hung in (behind, busy):
        line = describe_hang([standing(each) for each in (waiting, waiting, hung, waiting)], 60)
        assert (
            "rank 2 on alpha hangs in step 3, train, at kdrl_mcore/student/student.py:7" in line and "3 wait for others" in line
        )
        assert "rank 0" not in line and "rank 3" not in line


def test_where_all_wait_the_rank_that_has_not_come_is_named() -> None:
    """Rank 3 waits for rank 2 in another group's collective while the others wait for rank 3: every rank waits for another."""
    waiting = stands(entry(6, "0", 10, "started"))
    elsewhere = stands(entry(5, "0", 9), entry(6, "7", 4, "started"))
    assert not_come(dict(enumerate([waiting, waiting, waiting, elsewhere]))) == {2, 3}  # 2 is missing from 3's collective
    line = describe_hang([standing(waiting, 40), standing(waiting), standing(waiting), standing(elsewhere, 45)], 60)
    assert "every rank waits for another; least progress was made by rank 3 on alpha, in step 3" in line


def test_time_in_collectives_by_phase() -> None:
    """Of ten records the recorder still has five, which are taken to represent all; the last one is not complete."""
    phases = [(0, "rollout"), (int(7.5 * SECOND), "train")]
    entries = [entry(record, "0", record, duration_ms=500.0) for record in (5, 6, 7, 8, 9)]
    entries += [entry(10, "0", 10, "started"), entry(11, "0", 11, duration_ms=9e9)]
    seconds, last = seconds_in_collectives(dump(*entries), -1, phases)
    assert last == 9
    assert seconds == pytest.approx({"rollout": 3.0, "train": 2.0})
    assert seconds_in_collectives(dump(*entries), 7, phases) == ({"train": 1.0}, 9)
    assert seconds_in_collectives(dump(*entries), 9, phases) == ({}, 9)


def test_a_slow_gpu_is_found_though_all_main_threads_wait_alike() -> None:
    """Each rank spends 10 s in the update, during which the fast ranks' GPUs wait 6 s for the slow rank's."""
    own = []
    for waited in (6.0, 6.0, 0.5, 6.0):
        records = dump(*(entry(record, "0", record, duration_ms=1e3 * waited / 4) for record in range(1, 5)))
        seconds, _ = seconds_in_collectives(records, 0, [(0, "train")])
        own.append({"train": 10.0 - seconds["train"]})
    assert slow_ranks(own, seconds=12.0) == [(2, "train", 9.5, 4.0)]
    assert slow_ranks([{"train": 10.0}] * 4, seconds=12.0) == []  # by the frames alone


def own_work_on_rank() -> list[dict[str, float]]:
    """What a watchdog counts as own work, twice, in 10 s of which the GPU spent 6 in collectives according to the recorder."""
    from kdrl_mcore.resilience import watchdog as module

    watchdog = module.Watchdog(timeout=0.0, run=10**6 + 1)
    watchdog.enter(1, "train")
    watchdog._own["train"] = 10.0
    records = [entry(record, "0", record, time_created_ns=time.time_ns(), duration_ms=1500.0) for record in range(4)]
    with patch.object(module, "read_recorder", lambda: dump(*records)):
        return [watchdog.take_own_work(), watchdog.take_own_work()]


def test_the_watchdog_counts_no_collective_as_own_work(ranks1: RankPool) -> None:
    assert ranks1.run(own_work_on_rank) == [[{"train": pytest.approx(4.0)}, {}]]


@pytest.mark.parametrize(("state", "told"), [("started", "every rank waits for another"), ("scheduled", "rank 0 on ")])
def test_the_watchdog_asks_the_recorder_whether_a_rank_waits(state: str, told: str) -> None:
    """The main thread's frame is the same: it is in the function that reads a result."""
    script = f"""
import threading
import torch.distributed as dist
from kdrl_mcore.resilience import watchdog
from tests.support.flight_records import dump, entry
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
watchdog.read_recorder = lambda: dump(entry(6, "0", 10, "{state}"))
with watchdog.Watchdog(timeout=0.5):
    threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == HANG_EXIT_CODE
    assert f"hang: no rank made progress for 0.5 s: {told}" in done.stderr, done.stderr


def record_on_rank() -> dict[str, Any]:
    """Rank 0 calls a collective that rank 1 does not join until rank 0's recorder has been read."""
    import torch
    import torch.distributed as dist

    group = dist.new_group([0, 1])
    key = f"flight/{group.group_name}"
    store = dist.distributed_c10d._get_default_store()
    dist.all_reduce(torch.ones(2), group=group)
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(2), group=group, async_op=True)
    complete = False
    while not complete:  # a thread of gloo marks the first one
        found = json.loads(torch._C._distributed_c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False))
        complete = next(each["retired"] for each in found["entries"] if each["process_group"][0] == group.group_name)
    store.set(f"{key}/{dist.get_rank()}", "read")
    store.wait([f"{key}/{1 - dist.get_rank()}"])
    if dist.get_rank() == 1:
        dist.all_reduce(torch.ones(2), group=group)
    else:
        work.wait()
    standing = asdict(recorded(found, ranks_of_groups()))
    return {"name": group.group_name, "begun": standing["begun"], "waits_in": standing["waits_in"]}


def test_a_real_recorder_has_the_format_that_is_read(ranks2: RankPool) -> None:
    """Gloo's recorder uses the same code of torch: rank 0 waits, and rank 1 has not joined."""
    zero, one = ranks2.run(record_on_rank)
    name = zero["name"]
    assert zero["begun"][name] == one["begun"][name] + 1
    assert zero["waits_in"][name] == (zero["begun"][name], [0, 1]) and name not in one["waits_in"]
    ranks = {rank: Recorded(each["begun"], each["waits_in"]) for rank, each in enumerate((zero, one))}
    assert not_come(ranks) == {1}
