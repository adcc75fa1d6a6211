"""The manifest of a checkpoint: the size and checksum of each of its files, written when all of them are on disk.

A checkpoint without a manifest is incomplete. Each rank computes the checksums of the files it wrote, and ranks share the
verification: none ever reads the whole checkpoint.
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
from kdrl_mcore.parallel.collect import gather_objects

MANIFEST = "manifest.json"

FileSums = dict[str, dict[str, Any]]
"""`bytes` and `sha256` by path relative to the checkpoint."""


def checksum(root: Path, files: Iterable[Path]) -> FileSums:
    """Size and checksum of files below `root`, read back from the file system."""
    sums: FileSums = {}
    for path in files:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sums[path.relative_to(root).as_posix()] = {"bytes": stream.tell(), "sha256": digest}
    return sums


def files_below(root: Path) -> list[Path]:
    """Every file of a checkpoint except the manifest, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)


def write_manifest(root: Path, known: Mapping[str, Any]) -> None:
    """Write the manifest of every file below `root`; `known` holds the checksums that ranks have already computed."""
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
    """The files that a checkpoint must have.

    Raises:
        CheckpointError: the manifest is missing or cannot be read.
    """
    path = root / MANIFEST
    try:
        return json.loads(path.read_text())["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{root} is incomplete: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def first_missing(root: Path) -> str | None:
    """The first file that is missing or has the wrong size, as a message; None if there is none. Reads only the manifest."""
    try:
        files = read_manifest(root)
    except CheckpointError as error:
        return str(error)
    for name, entry in files.items():
        path = root / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, but {entry['bytes']} in the manifest: it is cut short or damaged"
    return None


def find_damage(root: Path) -> str | None:
    """What is wrong with a checkpoint (a bad file, by name); None if every byte is as it was written.

    The result is the same on every rank. Collective over the world: each rank reads its share of the files, then one
    all-gather.
    """
    found = first_missing(root)
    if found is None:
        names = sorted(read_manifest(root).items(), key=lambda item: -item[1]["bytes"])
        for name, entry in names[dist.get_rank() :: dist.get_world_size()]:
            try:
                if checksum(root, [root / name])[name] != entry:
                    found = f"{root / name} is damaged: its checksum differs from the manifest"
            except OSError as error:
                found = f"{root / name} cannot be read: {error.strerror}"
            if found:
                break
    return next((answer for answer in gather_objects(found) if answer), None)
