"""The cores and the memory that this process may use: the machine's, or those of its container or job if these have less.

Linux limits a process by its control group and by every group above it. Version 2 has one tree of groups, version 1 one for
each resource. In a container the path of the group may be the host's; then the limits are those at the root of the tree.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def num_cores() -> int:
    """The number of cores that this process may use; a share of the CPUs' time counts as that many cores, rounded up."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for group in _groups("cpu"):
        version_1 = (*_numbers(group / "cpu.cfs_quota_us"), *_numbers(group / "cpu.cfs_period_us"))
        quota, period = _numbers(group / "cpu.max") or version_1 or (-1, 1)
        if quota > 0:  # -1 is no limit
            cores = min(cores, math.ceil(quota / period))
    return cores


def free_memory() -> int:
    """The bytes of memory that processes can still allocate here: what is free, and what Linux frees when it is needed."""
    free: int = psutil.virtual_memory().available
    for group in _groups("memory"):
        for limit_file, used_file, freed in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _numbers(group / limit_file), _numbers(group / used_file)
            if limit and used:
                free = min(free, max(0, limit[0] - used[0] + _statistic(group / "memory.stat", freed)))
    return free


def _groups(resource: str) -> Iterator[Path]:
    """The folders of the control groups that may limit this process, innermost first."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, resources, path = line.split(":", 2)
        if resources and resource not in resources.split(","):
            continue
        root = _GROUPS / resource if resources else _GROUPS
        group = root / path.lstrip("/")
        yield group
        while group != root:
            group = group.parent
            yield group


def _numbers(file: Path) -> tuple[int, ...]:
    """The numbers in a file; empty if there is no file, or it says that there is no limit ("max")."""
    try:
        return tuple(int(word) for word in file.read_text().split())
    except (OSError, ValueError):
        return ()


def _statistic(file: Path, name: str) -> int:
    try:
        return next((int(value) for key, value in map(str.split, file.read_text().splitlines()) if key == name), 0)
    except (OSError, ValueError):
        return 0
