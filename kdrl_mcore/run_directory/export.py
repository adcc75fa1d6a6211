"""`RUN/hf`, where a run exports its student.

A run replaces only an export that it recognises as its own (`convert.targets`). An export that was copied with the run
directory, has been changed since, or was written by a version that did not mark its exports is set aside. Anything else there
is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from kdrl_mcore.checkpointing.checkpoint import checkpoint_dirs
from kdrl_mcore.convert.targets import check_target, is_own
from kdrl_mcore.run_directory.branches import LEFT
from kdrl_mcore.run_directory.record import read_record

EXPORT = "hf"
ADAPTER_EXPORT = "adapter"
"""The adapters alone, as a PEFT folder, where a run trains adapters."""


def check_export(run_dir: Path, models: Sequence[str | Path], *, adapters: bool = False) -> None:
    """Check, before a run begins, that it may export.

    Args:
        models: the model folders that the run reads.
        adapters: it exports adapters, too.

    Raises:
        ModelError: something other than an export of this run is there, or the export is one of the models.
    """
    if not _is_to_be_set_aside(run_dir):
        check_target(run_dir / EXPORT, models, overwrite=True)
    if adapters:
        check_target(run_dir / ADAPTER_EXPORT, models, overwrite=True)


def set_aside(run_dir: Path) -> Path | None:
    """Move an earlier export that must not be replaced to `RUN/left`; returns where it is now, None if there is none."""
    if not _is_to_be_set_aside(run_dir):
        return None
    kept = next(path for number in count(1) if not (path := run_dir / LEFT / f"{EXPORT}_{number}").exists())
    kept.parent.mkdir(exist_ok=True)
    os.replace(run_dir / EXPORT, kept)
    return kept


def _is_to_be_set_aside(run_dir: Path) -> bool:
    folder = run_dir / EXPORT
    if folder.is_symlink() or not folder.is_dir() or is_own(folder):
        return False
    record = read_record(run_dir)
    of_earlier_version = not record.starts and bool(checkpoint_dirs(run_dir / "checkpoints"))
    return record.exported is not None or of_earlier_version
