"""The lock of a run directory: it has one live owner at a time, on one machine and on several; a dead owner does not hold
it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kdrl_mcore.errors import StorageError
from kdrl_mcore.run_directory import lock
from kdrl_mcore.run_directory.lock import LOCK_FILE, Owner, RunLock, live_owner, this_process

HOLD = "import sys, time; from pathlib import Path; from kdrl_mcore.run_directory.lock import RunLock; RunLock(Path(sys.argv[1])).__enter__(); print('held', flush=True); time.sleep(600)"  # noqa: E501


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the lock that a test can wait for."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 1.5)


def leave(run_dir: Path, **changed: Any) -> Owner:
    """Write the lock file of somebody else."""
    owner = replace(this_process({}), token="other", **changed)
    run_dir.mkdir(exist_ok=True)
    (run_dir / LOCK_FILE).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_live_owner_is_named_and_its_directory_left_alone(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    content = (tmp_path / LOCK_FILE).read_text()
    with pytest.raises(StorageError, match=rf"is in use by process {holder.pid} on \S+, since .*set another run.dir"):
        RunLock(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE] and (tmp_path / LOCK_FILE).read_text() == content
    owner = live_owner(tmp_path)
    assert owner is not None and owner.pid == holder.pid


@pytest.mark.parametrize("reaped", [True, False])
def test_an_owner_that_was_killed_does_not_hold_it(holder: subprocess.Popen[str], tmp_path: Path, reaped: bool) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its parent has not reaped it
    assert live_owner(tmp_path) is None
    with RunLock(tmp_path) as held:
        assert held.me.pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_a_process_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    leave(tmp_path, pid=os.getppid(), started=1.0)
    with RunLock(tmp_path):
        pass


def test_an_earlier_run_of_this_process_is_over(tmp_path: Path) -> None:
    leave(tmp_path)
    with RunLock(tmp_path):
        pass


def test_it_is_released_after_an_error_and_a_folder_in_which_nothing_was_written_goes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "a" / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "run").exists()
    with RunLock(tmp_path / "b"):
        (tmp_path / "b" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


def test_on_another_machine_an_owner_that_touches_its_lock_lives(tmp_path: Path, quick: None) -> None:
    leave(tmp_path, machine="elsewhere", host="node7", job="12")
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(StorageError, match=r"in use by process \d+ on node7, SLURM job 12, since"):
            RunLock(tmp_path, this_process({"SLURM_JOB_ID": "13"})).__enter__()
    finally:
        ended.set()
        thread.join()
    with RunLock(tmp_path):  # an owner that no longer renews it is gone, whatever the clocks say
        pass


def test_a_live_owner_touches_its_lock(tmp_path: Path, quick: None) -> None:
    with RunLock(tmp_path) as held:
        os.utime(held.path, (1, 1))
        deadline = time.monotonic() + 60
        while held.path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("job", "start", "at_once"), [("12", "1", True), ("12", "0", False), ("13", "1", False), ("", "", False)]
)
def test_a_job_that_slurm_starts_again_gets_it_at_once(
    job: str, start: str, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, machine="elsewhere", job="12", start=0)
    watched: list[Owner] = []
    monkeypatch.setattr(lock, "_is_touched", lambda path, owner: bool(watched.append(owner)))
    with RunLock(tmp_path, this_process({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": start})):
        assert (watched == []) == at_once


def test_of_many_that_find_a_dead_owner_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        leave(tmp_path, pid=os.getppid(), started=1.0)
        together, answers, over = context.Barrier(8), context.Queue(), context.Event()
        processes = [context.Process(target=_try, args=(tmp_path, together, answers, over)) for _ in range(8)]
        for process in processes:
            process.start()
        outcomes = [answers.get(timeout=60) for _ in processes]
        over.set()
        for process in processes:
            process.join()
        assert sorted(outcomes) == [*["refused"] * 7, "taken"]
        assert list(tmp_path.iterdir()) == []


def _try(run_dir: Path, together: Any, answers: Any, over: Any) -> None:
    together.wait()
    try:
        with RunLock(run_dir):
            answers.put("taken")
            over.wait()
    except StorageError:
        answers.put("refused")


def test_one_that_slept_too_long_notices_that_another_has_it(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        held.check()
        leave(tmp_path, host="node7")
        with pytest.raises(StorageError, match=r"was taken over by process .* on node7"):
            held.check()
    assert (tmp_path / LOCK_FILE).exists()  # the other owner's file


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": "a"}', '{"host": 3}'])
def test_a_lock_that_names_nobody_holds_nobody(content: str, tmp_path: Path, quick: None) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with RunLock(tmp_path):
        pass


def test_a_file_system_without_hard_links_will_do(holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="in use by"):
        RunLock(tmp_path).__enter__()
    holder.kill()
    holder.wait()
    with RunLock(tmp_path):
        assert live_owner(tmp_path) is None  # the owner is this process itself


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"^cannot write .*: set run.dir to a folder that can be written"):
        RunLock(tmp_path / "file" / "run").__enter__()
