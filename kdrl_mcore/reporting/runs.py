"""The runs a report compares, and which of them are one configuration with several seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_mcore.experiments.study import changed_keys, read_config
from kdrl_mcore.monitoring.alerts import Alert, check_alerts
from kdrl_mcore.monitoring.metrics import read_metrics

_SEED_SUFFIX = re.compile(r"[-_]seed\d+(-[0-9a-f]{8})?$")
SEED_KEY = "trainer.seed"
MAX_LOOKS = 200
"""How often the signatures of failure are looked for along a run: each look reads all steps before it."""


@dataclass(frozen=True)
class Run:
    """A run's name, directory, metrics (one dict a step) and flat configuration (empty where it has none)."""

    name: str
    directory: Path
    rows: list[dict[str, float]]
    config: dict[str, Any]

    @property
    def steps(self) -> int:
        """How many steps it is to train: as configured, or else as many as it has."""
        return int(self.config.get("trainer.steps", self.rows[-1]["step"]))

    @property
    def is_done(self) -> bool:
        """Whether its last step is there."""
        return self.rows[-1]["step"] >= self.steps

    def alerts(self) -> list[tuple[int, Alert]]:
        """Each failure signature and the step in which it began to show (of a long run, to within a two-hundredth of it)."""
        began, showing = list[tuple[int, Alert]](), set[str]()
        stride = math.ceil(len(self.rows) / MAX_LOOKS)
        for end in range(len(self.rows) % stride or stride, len(self.rows) + 1, stride):
            alerts = check_alerts(self.rows[:end])
            began += [(int(self.rows[end - 1]["step"]), alert) for alert in alerts if alert.name not in showing]
            showing = {alert.name for alert in alerts}
        return began


@dataclass(frozen=True)
class Group:
    """What the report shows as one: the runs of one configuration, which differ in the seed only."""

    name: str
    runs: list[Run]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read each run.

    Raises:
        DataError: a directory has no metrics, or damaged ones.
    """
    return [
        Run(name, directory, read_metrics(directory), read_config(directory))
        for name, directory in zip(run_names(directories), directories, strict=True)
    ]


def run_names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole path where that would not tell two runs apart."""
    names = [directory.resolve().name for directory in directories]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)]


def by_configuration(runs: Sequence[Run]) -> list[Group]:
    """One group for all runs whose configuration differs in the seed only (without one: whose name does); in order.

    A group is named as its runs are, without the seed, where that tells it apart from the others.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        known = {key: value for key, value in changed_keys(run.config).items() if key != SEED_KEY}
        found.setdefault(json.dumps(known, sort_keys=True) if run.config else _short(run), []).append(run)
    short = [_short(group[0]) for group in found.values()]
    return [
        Group(name if short.count(name) == 1 else group[0].name, group)
        for name, group in zip(short, found.values(), strict=True)
    ]


def _short(run: Run) -> str:
    return _SEED_SUFFIX.sub("", run.name)


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The keys in which the groups differ, each with the value of every group (None where it is not known)."""
    configs = [group.runs[0].config for group in groups]
    keys = sorted({key for config in configs for key in config} - {"run.dir", SEED_KEY})
    table = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in table.items() if len({json.dumps(value) for value in values}) > 1}
