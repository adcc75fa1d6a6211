"""The limits of containers and jobs on cores and memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from kdrl_mcore.parallel import host_limits

GIB = 2**30
CACHE = "anon 900\ninactive_file 100\ntotal_inactive_file 200\n"
"""Linux frees the file cache as soon as a process needs memory."""

Files = dict[str, str]


def group(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, files: Files) -> None:
    """Put this process into a control group, on a machine of 8 cores with 64 GiB free."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(own)
    monkeypatch.setattr(host_limits, "_GROUPS", folder)
    monkeypatch.setattr(host_limits, "_OWN_GROUPS", folder / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))


V1 = "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n"
JOB = "0::/system.slice/job_7/step_0\n"


@pytest.mark.parametrize(
    ("own", "files", "cores", "free"),
    [
        ("0::/\n", {}, 8, 64 * GIB),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "1000\n"}, 8, 64 * GIB),
        (
            "0::/\n",
            {"cpu.max": "250000 100000\n", "memory.max": "3000\n", "memory.current": "1000\n", "memory.stat": CACHE},
            *(3, 2100),
        ),
        (
            JOB,
            {"system.slice/job_7/cpu.max": "200000 100000", "system.slice/job_7/memory.max": "5000"}
            | {"system.slice/job_7/memory.current": "1000", "system.slice/job_7/step_0/memory.max": "max"},
            *(2, 4000),
        ),
        (
            V1,
            {"cpu/docker/1/cpu.cfs_quota_us": "400000", "cpu/docker/1/cpu.cfs_period_us": "100000"}
            | {"memory/docker/1/memory.limit_in_bytes": "5000", "memory/docker/1/memory.usage_in_bytes": "1000"}
            | {"memory/docker/1/memory.stat": CACHE},
            *(4, 4200),
        ),
        (
            V1,  # as seen in the container: only the roots exist
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
            | {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1000"},
            *(8, 64 * GIB),
        ),
        ("0::/\n", {"memory.max": "1000", "memory.current": "3000"}, 8, 0),
    ],
    ids=["none", "unlimited", "container", "SLURM job", "version 1", "version 1, unlimited", "more used than allowed"],
)
def test_the_narrowest_limit_counts(
    own: str, files: Files, cores: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(monkeypatch, tmp_path, own, files)
    assert (host_limits.num_cores(), host_limits.free_memory()) == (cores, free)


def test_where_there_are_no_groups_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "_OWN_GROUPS", tmp_path / "absent")
    assert host_limits.num_cores() >= 1 and host_limits.free_memory() > 0
