"""The manifest of a checkpoint: size and checksum of each of its files, written when all of them are on disk.

A checkpoint without a manifest is incomplete. Ranks checksum what they wrote, and share the work of verifying: no rank ever
reads the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdrl_mcore.errors import CheckpointError

MANIFEST = "manifest.json"

FileSums = dict[str, dict[str, Any]]
"""By path relative to the checkpoint: `bytes` and `sha256`."""


def checksum(root: Path, files: Iterable[Path]) -> FileSums:
    """Size and checksum of files below `root`, read back from the file system."""
    sums: FileSums = {}
    for path in files:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sums[path.relative_to(root).as_posix()] = {"bytes": stream.tell(), "sha256": digest}
    return sums


def files_below(root: Path) -> list[Path]:
    """Every file of a checkpoint but the manifest, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)


def write_manifest(root: Path, known: Mapping[str, Any]) -> None:
    """Write the manifest over every file below `root`; `known` holds the sums that other ranks computed."""
    sums = dict(known)
    sums.update(checksum(root, [path for path in files_below(root) if path.relative_to(root).as_posix() not in sums]))
    write_durably(root / MANIFEST, json.dumps({"files": dict(sorted(sums.items()))}, indent=1) + "\n")


def write_durably(path: Path, text: str) -> None:
    """Write a text file that is on disk when this returns."""
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(root: Path) -> FileSums:
    """The files a checkpoint must have.

    Raises:
        CheckpointError: no manifest, or not a readable one.
    """
    path = root / MANIFEST
    try:
        return json.loads(path.read_text())["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{root} is incomplete: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def first_missing(root: Path) -> str | None:
    """What is wrong with the files' presence and sizes, or None. Reads the manifest only."""
    try:
        files = read_manifest(root)
    except CheckpointError as error:
        return str(error)
    for name, entry in files.items():
        path = root / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: it is cut short or damaged"
    return None


def find_damage(root: Path) -> str | None:
    """What is wrong with a checkpoint (the first bad file, by name), or None if every byte is as it was written.

    The same answer on every rank. Collective over the world: each rank reads its share of the files, then one all-gather.
    """
    found = first_missing(root)
    if found is None:
        names = sorted(read_manifest(root).items(), key=lambda item: -item[1]["bytes"])
        for name, entry in names[dist.get_rank() :: dist.get_world_size()]:
            try:
                if checksum(root, [root / name])[name] != entry:
                    found = f"{root / name} is damaged: its checksum is not the manifest's"
            except OSError as error:
                found = f"{root / name} cannot be read: {error.strerror}"
            if found:
                break
    answers: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, found)
    return next((answer for answer in answers if answer), None)
