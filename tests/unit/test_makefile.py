"""`make test` with stand-ins for the tools: every group runs, and the end names those that failed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that counts as set up, whose tools note how they are called and fail where $FAIL is part of that."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >>calls\ncase "{name} $* end" in *$FAIL*) exit 1 ;; esac\n')
        (tools / name).chmod(0o755)
    return tmp_path


def make(tree: Path, fail: str) -> subprocess.CompletedProcess[str]:
    variables = ["INSTALLED=ready", "VLLM_INSTALLED=ready", "NEWER_CORE_INSTALLED=", "SYSTEM_INSTALLED="]
    (tree / "ready").touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "test", *variables]
    return subprocess.run(command, cwd=tree, env=environment | {"FAIL": fail}, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("fail", "failed"),
    [
        ("nothing of this", ""),
        ("mypy", "check"),
        ("--ignore*--ignore", "test-main"),
        ("loadscope-reorder?tests/rollout", "test-vllm"),
        ("pytest?tests/slurm", "test-slurm"),
        ("pytest", "test-main test-vllm test-slurm"),
    ],
)
def test_a_group_that_fails_does_not_keep_the_others_from_running(fail: str, failed: str, tree: Path) -> None:
    done = make(tree, fail)
    assert (done.returncode != 0) == bool(failed), done.stderr
    calls = [call.split() for call in (tree / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["ruff", "ruff", "mypy", "python", "python", "python"]
    assert [call[-1] for call in calls[3:]] == ["tests/slurm", "tests/rollout", "tests/slurm"]
    assert f"failed: {failed} (" in done.stderr if failed else "failed" not in done.stderr
