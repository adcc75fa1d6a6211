"""Damaged and incomplete checkpoints are refused by name and the one before is used; the only good one is never deleted."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT, resuming
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def checkpoints(ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a run, after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [*resuming.make_job(folder), f"run.dir={folder}/run", "trainer.steps=2", "checkpoint.every=1"]
    assert ranks1.run(resuming.train, overrides)[0][0] == 0
    return folder / "run" / "checkpoints"


@pytest.fixture
def copied(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints, tmp_path / "checkpoints", symlinks=True))


def flip_one_bit(path: Path) -> None:
    """Damage the file at a random position."""
    data = bytearray(path.read_bytes())
    index = random.Random(path.name).randrange(len(data))
    data[index] ^= 1 << (index % 8)
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    """Truncate the file, as an interrupted write would."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_one_bit, cut_in_half, Path.unlink], ids=["flipped", "cut", "missing"])
def test_every_damaged_file_is_named_and_the_checkpoint_before_is_used(
    damage: Callable[[Path], None], copied: Path, ranks1: RankPool
) -> None:
    newest, before = copied / "step_000002", copied / "step_000001"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 8
    for file in files:
        kept = file.read_bytes()
        damage(file)
        assert ranks1.run(resuming.find, str(copied)) == [str(before)]
        (refused,) = ranks1.run(resuming.find, str(copied), str(newest))
        assert refused.startswith("error: ") and (str(file) in refused or file.name == "manifest.json"), refused
        file.write_bytes(kept)
    assert ranks1.run(resuming.find, str(copied)) == [str(newest)]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(copied: Path, ranks1: RankPool) -> None:
    for name in ("step_000001", "step_000002"):
        flip_one_bit(copied / name / "trainer_state.json")
    (answer,) = ranks1.run(resuming.find, str(copied))
    assert answer.startswith(f"error: no checkpoint in {copied} is intact (2 refused)")
    assert "checkpoint.resume=never" in answer


def test_old_checkpoints_go_only_when_enough_whole_ones_are_newer(copied: Path, ranks1: RankPool) -> None:
    for step in (3, 4):
        shutil.copytree(copied / "step_000002", copied / f"step_{step:06d}")
    cut_in_half(copied / "step_000003" / "trainer_state.json")
    ranks1.run(resuming.prune, str(copied), 2, "step_000004")
    assert sorted(path.name for path in copied.glob("step_*")) == ["step_000002", "step_000003", "step_000004"]


def test_of_a_run_that_went_back_later_checkpoints_do_not_count(copied: Path, ranks1: RankPool) -> None:
    (copied / "latest").unlink()
    (copied / "latest").symlink_to("step_000001")
    assert ranks1.run(resuming.find, str(copied)) == [str(copied / "step_000001")]


def test_a_killed_rank_leaves_no_process_that_keeps_its_output_open(ranks1: RankPool) -> None:
    """Nor one that prints after the run's last line, as a writer would whose results nobody takes any more."""
    (left,) = ranks1.run(resuming.leave_writers)
    assert len(left) == 2
    deadline = time.monotonic() + 60
    for pid in left:
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, "it still lives"
                time.sleep(0.05)


def test_killed_at_20_random_moments_of_a_save_the_latest_checkpoint_is_whole(tmp_path: Path) -> None:
    resuming.make_job(tmp_path)
    command = [sys.executable, "-m", "tests.support.kill_while_saving", str(tmp_path), "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = done.stdout.split()
    assert outcome.count("whole") == 20
    assert len(outcome) == 20
