"""The runs that a report compares, grouped into configurations with several seeds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.metrics import METRICS_FILE, read_metrics
from kdrl_mcore.studies.report.starts import Start, read_starts
from kdrl_mcore.studies.study import changed_keys, read_config

_SEED_SUFFIX = re.compile(r"[-_]seed\d+(-[0-9a-f]{8})?$")
SEED_KEY = "trainer.seed"


@dataclass(frozen=True)
class RunHistory:
    """A run as its directory records it.

    Attributes:
        name, directory: its name in the report, and its directory.
        rows: its metrics, one dict per step.
        config: its flat configuration; empty if it has none.
        starts: its starts; empty if they were not recorded.
        damage: a line for each part of the directory that cannot be read.
    """

    name: str
    directory: Path
    rows: list[dict[str, float]]
    config: dict[str, Any] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step in its metrics."""
        return int(self.rows[-1]["step"])

    @property
    def steps(self) -> int:
        """The configured number of steps; the last step so far where the configuration has none."""
        steps = self.config.get("trainer.steps")
        return steps if isinstance(steps, int) else self.step

    @property
    def is_done(self) -> bool:
        """Whether it has trained its last step."""
        return self.step >= self.steps


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ only in the seed; the report shows them as one."""

    name: str
    runs: list[RunHistory]


def read_runs(directories: Sequence[Path], on_left_out: Callable[[str], None] | None = None) -> list[RunHistory]:
    """Read each run; duplicates of a directory are read once.

    Args:
        on_left_out: called with a line for each directory without metrics, if another one has some.

    Raises:
        DataError: a path is not a directory, or has no metrics and may not be left out.
    """
    directories = list({directory.resolve(): directory for directory in directories}.values())
    runs, faults = list[RunHistory](), list[DataError]()
    for name, directory in zip(run_names(directories), directories, strict=True):
        if not directory.is_dir():
            raise DataError(f"{directory}: no such directory; name run directories (run.dir)")
        try:
            runs.append(_read_run(name, directory))
        except DataError as error:
            faults.append(error)
    for fault in faults:
        if on_left_out is None or not runs:
            raise fault
        on_left_out(f"left out: {fault}")
    return runs


def _read_run(name: str, directory: Path) -> RunHistory:
    lines = list[int]()
    rows = read_metrics(directory, on_damage=lines.append)
    damage = []
    if lines:
        lost = "1 line cannot be read and is" if len(lines) == 1 else f"{len(lines)} lines cannot be read and are"
        damage.append(f"{METRICS_FILE}: {lost} left out (line {lines[0]}{', ...' if len(lines) > 1 else ''})")
    try:
        config = read_config(directory)
    except ConfigError as error:
        config = {}
        damage.append(f"its configuration cannot be read: {error}")
    try:
        starts = read_starts(directory)
    except DataError as error:
        starts = []
        damage.append(str(error))
    return RunHistory(name, directory, rows, config, starts, damage)


def run_names(directories: Sequence[Path]) -> list[str]:
    """The last component of each path; the whole path where that would be ambiguous. Bytes that are not UTF-8 become U+FFFD."""
    names = [directory.resolve().name for directory in directories]
    unique = [name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)]
    return [os.fsencode(name).decode(errors="replace") for name in unique]


def by_configuration(runs: Sequence[RunHistory]) -> list[Group]:
    """One group for all runs whose configurations differ only in the seed (without a configuration: whose names do); in order.

    Runs with the same seed are not two draws, so they belong to separate groups. A group has its runs' name without the seed,
    unless that is ambiguous.
    """
    found: dict[tuple[str, int], list[RunHistory]] = {}
    seen: dict[tuple[str, Any], int] = {}
    for run in runs:
        known = {key: value for key, value in changed_keys(run.config).items() if key != SEED_KEY}
        key = json.dumps(known, sort_keys=True, default=str) if run.config else _short(run)
        draw = key, run.config.get(SEED_KEY) if run.config else run.name
        seen[draw] = seen.get(draw, 0) + 1
        found.setdefault((key, seen[draw]), []).append(run)
    short = [_short(group[0]) for group in found.values()]
    return [
        Group(name if short.count(name) == 1 else group[0].name, group)
        for name, group in zip(short, found.values(), strict=True)
    ]


def _short(run: RunHistory) -> str:
    return _SEED_SUFFIX.sub("", run.name)


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The keys in which the groups differ, each with the value of every group (None if it has no configuration or no such
    key)."""
    configs = [group.runs[0].config for group in groups]
    keys = sorted({key for config in configs for key in config} - {"run.dir", SEED_KEY})
    known = {key: {json.dumps(config.get(key), default=str) for config in configs if config} for key in keys}
    return {key: [config.get(key) for config in configs] for key in keys if len(known[key]) > 1}
