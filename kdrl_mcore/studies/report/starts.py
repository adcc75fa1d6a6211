"""The starts of a run: the commands, versions and commits that a run directory records."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrl_mcore.errors import DataError

RECORD = "run.json"


@dataclass(frozen=True)
class Start:
    """One start of a run; fields that its record does not have are empty, or 0.

    Attributes:
        time, command: when and by which command it was started.
        commit, versions: the commit of the checkout, and the versions of packages.
        host, world_size: rank 0's machine, and the number of ranks.
        resumed_from, step: the checkpoint it resumed from, and that checkpoint's step.
        changes: a line for each key that differs from the checkpoint's.
    """

    time: str = ""
    command: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    host: str = ""
    world_size: int = 0
    resumed_from: str = ""
    step: int = 0
    changes: list[str] = field(default_factory=list)

    @property
    def all_versions(self) -> str:
        """The versions on one line, without packages that are not installed."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)


def read_starts(directory: Path) -> list[Start]:
    """The starts of a run, oldest first; an empty list if the directory has no record.

    Raises:
        DataError: the record cannot be read.
    """
    path = directory / RECORD
    if not path.is_file():
        return []
    try:
        record = json.loads(path.read_bytes())
        entries = record["starts"] if isinstance(record, dict) else record
        return [_start(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{RECORD} cannot be read: it has no list of starts") from error


def _start(entry: dict[str, Any]) -> Start:
    command = entry.get("command") or ""
    return Start(
        time=_word(entry.get("time")),
        command=shlex.join(map(str, command)) if isinstance(command, list) else str(command),
        commit=_word(entry.get("commit")),
        versions={str(name): _word(version) for name, version in (entry.get("versions") or {}).items()},
        host=_word(entry.get("host")),
        world_size=int(entry.get("world_size") or 0),
        resumed_from=_word(entry.get("resumed_from")),
        step=int(entry.get("step") or 0),
        changes=[str(line) for line in entry.get("changes") or []],
    )


def _word(value: Any) -> str:
    return "" if value is None else str(value)
