"""The pool of ranks itself: results, and failures that do not spread to the next test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import ROOT
from tests.support.fork_server import ForkServerError, import_torch, server_for
from tests.support.ranks import RankDiedError, RankError, RankPool, RankTimeoutError


class NeedsTwoArgumentsError(Exception):
    """An error that can be pickled but not unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def leave_a_mark() -> None:
    assert os.environ["COLOUR"] == "blue" and not dist.is_initialized()
    imported = {name.split(".")[0] for name in sys.modules} & {"kdrl_mcore", "megatron"}
    os.environ["MARK"] = f"rank {os.environ['LOCAL_RANK']}: {sorted(imported)}"


def is_imported(name: str) -> bool:
    return name in sys.modules


def fail_to_prepare() -> None:
    raise KeyError("no such device")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2, preload=import_torch)
    yield pool
    pool.close()


def sum_of_ranks(offset: int) -> tuple[int, int, dict[str, str]]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return int(total), torch.get_num_threads(), {name: os.environ[name] for name in names}


def raise_on(ranks: tuple[int, ...]) -> None:
    if dist.get_rank() in ranks:
        raise KeyError(f"from rank {dist.get_rank()}")


def raise_while_the_other_waits() -> None:
    if dist.get_rank() == 1:
        raise KeyError("before the barrier")
    dist.barrier()


def raise_what_cannot_be_made_again() -> None:
    raise NeedsTwoArgumentsError("some", "thing")


def wait_for_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


def kill_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def surroundings(*variables: str) -> tuple[str, list[str | None]]:
    return os.getcwd(), [os.environ.get(name) for name in variables]


def start_a_child() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def check_works(pool: RankPool) -> None:
    assert [result[0] for result in pool.run(sum_of_ranks, 5)] == [11, 11]


def is_running(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def test_results_come_by_rank_and_processes_are_reused(pool: RankPool) -> None:
    results = pool.run(sum_of_ranks, 5)
    pids = pool.pids
    for rank, (total, threads, environment) in enumerate(results):
        assert (total, threads) == (11, 1)
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert environment == expected
    check_works(pool)
    assert pool.pids == pids


def test_an_exception_of_all_ranks_keeps_the_pool(pool: RankPool) -> None:
    check_works(pool)
    pids = pool.pids
    with pytest.raises(KeyError, match="from rank 0") as caught:
        pool.run(raise_on, (0, 1))
    assert "raised on rank 0" in caught.value.__notes__[0]
    assert "in raise_on" in caught.value.__notes__[0]
    check_works(pool)
    assert pool.pids == pids


@pytest.mark.parametrize("function, args", [(raise_on, ((1,),)), (raise_while_the_other_waits, ())])
def test_an_exception_of_one_rank_restarts_the_pool(
    pool: RankPool, function: Callable[..., None], args: tuple[object, ...]
) -> None:
    check_works(pool)
    pids = pool.pids
    with pytest.raises(KeyError) as caught:
        pool.run(function, *args)
    assert "raised on rank 1" in caught.value.__notes__[0]
    wait_until_gone(pids)
    check_works(pool)


def test_an_exception_that_cannot_be_sent_comes_as_text(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0.*in raise_what_cannot_be_made_again.*something"):
        pool.run(raise_what_cannot_be_made_again)


def test_a_timeout_kills_and_restarts_the_pool(pool: RankPool) -> None:
    check_works(pool)
    pids = pool.pids
    with pytest.raises(RankTimeoutError, match=r"ranks \[0, 1\] of 2 did not finish .*wait_for_rank_0 in 2 s"):
        pool.run(wait_for_rank_0, timeout=2)
    wait_until_gone(pids)
    check_works(pool)


def test_a_killed_rank_is_named_and_the_pool_restarts(pool: RankPool) -> None:
    with pytest.raises(RankDiedError, match=r"rank 1 of 2 died in .*kill_rank \(exit code -9\)"):
        pool.run(kill_rank, 1)
    check_works(pool)


def test_closing_ends_the_ranks_and_what_they_started() -> None:
    pool = RankPool(1, preload=import_torch)
    (child,) = pool.run(start_a_child)
    pids = [*pool.pids, child]
    assert all(map(is_running, pids))
    pool.close()
    wait_until_gone(pids)
    assert pool.pids == []


def test_ranks_begin_where_the_test_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: RankPool) -> None:
    check_works(pool)  # so that the process they are forked from already exists
    pool.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLOUR", "green")
    assert pool.run(surroundings, "COLOUR") == [(str(tmp_path), ["green"])] * 2
    pool.close()
    monkeypatch.delenv("COLOUR")
    assert pool.run(surroundings, "COLOUR") == [(str(tmp_path), [None])] * 2


def test_a_pool_can_prepare_its_ranks_before_anything_is_imported(pool: RankPool) -> None:
    prepared = RankPool(2, prepare=leave_a_mark, environment={"COLOUR": "blue"})
    try:
        found = prepared.run(surroundings, "COLOUR", "MARK")
        assert [values for _, values in found] == [["blue", "rank 0: []"], ["blue", "rank 1: []"]]
        assert [values for _, values in pool.run(surroundings, "COLOUR", "MARK")] == [[None, None]] * 2
    finally:
        prepared.close()


def test_what_one_pool_prepares_is_not_imported_in_another_forked_from_the_same_process() -> None:
    from sched import scheduler  # a module that nothing else imports

    found = []
    for prepare in (scheduler, os.getpid):
        other = RankPool(1, prepare=prepare)
        try:
            found += other.run(is_imported, "sched")
        finally:
            other.close()
    assert found == [True, False]


def test_a_preparation_that_fails_is_an_error() -> None:
    with pytest.raises(KeyError, match="no such device"):
        RankPool(1, prepare=fail_to_prepare).run(os.getpid)
    with pytest.raises(ForkServerError, match=r"(?s)in fail_to_prepare.*no such device"):
        RankPool(1, preload=fail_to_prepare).run(os.getpid)


def test_ranks_are_forked_again_after_the_process_they_come_from_has_died(pool: RankPool) -> None:
    check_works(pool)
    pids = [*pool.pids, server_for(pool.preparation).pid]
    os.kill(pids[-1], signal.SIGKILL)
    wait_until_gone(pids)
    check_works(pool)


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from tests.support.fork_server import server_for\n"
        "from tests.support.ranks import RankPool\n"
        "if __name__ == '__main__':\n"
        "    pool = RankPool(2, preload=os.getpid)\n"
        "    pool.run(os.getpid)\n"
        "    print(*pool.pids, server_for(pool.preparation).pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_running, pids))
        parent.kill()
    wait_until_gone(pids)
