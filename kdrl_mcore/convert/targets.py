"""Write a model folder atomically: it is complete or absent, and no file that this program did not write is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kdrl_mcore.errors import ModelError

MARK = ".kdrl_mcore.json"
"""A file in every model folder that this program wrote: it lists the folder's files with their sizes and modification times.
A folder without it, or with any file that it does not list, belongs to somebody else."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(target: str | Path, sources: Sequence[str | Path] = (), *, overwrite: bool) -> None:
    """Check that a folder may be written, before writing anything.

    Args:
        sources: model folders that will be read while it is written.
        overwrite: a folder that this program wrote before may be replaced.

    Raises:
        ModelError: the folder is a source (or contains one, or lies in one), a link or a file, or may not be replaced.
    """
    target = Path(os.path.abspath(target))
    if target.is_symlink():
        raise ModelError(f"{target} is a symbolic link, which is never replaced: name the folder itself, or remove the link")
    for source in sources:
        if _overlap(target.resolve(), Path(source).resolve()):
            raise ModelError(
                f"{target} and its source {source} are the same folder, or one contains the other; a source is never replaced: "
                "name another folder"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ModelError(f"{target} exists and is not a folder: remove it or name another one")
    if not any(target.iterdir()):
        return
    foreign = _foreign_file(target)
    if foreign is not None:
        raise ModelError(
            f"{target} holds {foreign}, which was not written by kdrl_mcore (or was changed since) and is never replaced: "
            "remove the folder yourself, or name another one"
        )
    if not overwrite:
        raise ModelError(f"{target} was written before: add --overwrite to replace it, or name another folder")


def is_own(folder: Path) -> bool:
    """Whether every file in the folder, if there is any, is as this program wrote it."""
    return not any(folder.iterdir()) or _foreign_file(folder) is None


@contextmanager
def replacing_folder(
    target: str | Path, num_bytes: int, sources: Sequence[str | Path] = (), *, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `target` when the block succeeds and removed when it fails.

    Args:
        num_bytes: how much will be written, roughly.
        sources, overwrite: see `check_target`.

    Raises:
        ModelError: `target` may not be written, or there is not enough space.
    """
    try:
        temporary = begin(target, sources, overwrite=overwrite)
        try:
            free = shutil.disk_usage(temporary).free
            if free < num_bytes:
                raise OSError(errno.ENOSPC, f"{num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
            yield temporary
            put_in_place(temporary, target, sources, overwrite=overwrite)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = "no space is left on the device" if error.errno in _NO_SPACE else "writing failed"
        raise ModelError(f"cannot write {target}: {reason} ({error.strerror or error})") from error


def begin(target: str | Path, sources: Sequence[str | Path] = (), *, overwrite: bool) -> Path:
    """Make the empty temporary folder next to `target`, and remove the leftovers of an interrupted write.

    Raises:
        ModelError: see `check_target`.
        OSError: the folder cannot be made.
    """
    target = Path(os.path.abspath(target))
    temporary, old = _beside(target)
    if old.exists() and not target.exists() and (old / MARK).is_file():  # a write was killed between its two renames
        os.replace(old, target)
    check_target(target, sources, overwrite=overwrite)
    for left in (temporary, old):
        if left.is_symlink() or left.exists():
            if left.is_symlink() or not (left / MARK).is_file():
                raise ModelError(
                    f"{left} is in the way and was not written by kdrl_mcore: move it away, or name another folder"
                )
            shutil.rmtree(left)
    temporary.mkdir(parents=True)
    (temporary / MARK).write_text("{}\n")
    return temporary


def put_in_place(temporary: Path, target: str | Path, sources: Sequence[str | Path] = (), *, overwrite: bool) -> None:
    """Mark the folder that `begin` made as complete and rename it to `target`, which stays as it was until then.

    Raises:
        ModelError: `target` may no longer be replaced.
        OSError: the file system refused.
    """
    target = Path(os.path.abspath(target))
    check_target(target, sources, overwrite=overwrite)
    files = {name: _state(temporary / name) for name in _files(temporary)}
    (temporary / MARK).write_text(json.dumps({"written_by": "kdrl_mcore", "files": files}, indent=2) + "\n")
    _, old = _beside(target)
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")


def _overlap(target: Path, source: Path) -> bool:
    """Whether the two are the same or one contains the other, even where a mount shows one of them under another path."""
    return any(_same(source, each) for each in (target, *target.parents)) or any(_same(target, each) for each in source.parents)


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:  # one of them does not exist
        return False


def _foreign_file(folder: Path) -> str | None:
    """A file in the folder that is not listed in the mark, or differs from it; None where there is none."""
    try:
        written = json.loads((folder / MARK).read_text())["files"]
        found = _files(folder)
        return next((name for name in found if name not in written or _state(folder / name) != list(written[name])), None)
    except (OSError, ValueError, KeyError, TypeError):
        return next((name for name in _files(folder) if name != MARK), "a folder")


def _files(folder: Path) -> list[str]:
    """Every file and link below the folder except its mark."""
    found = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [str(path.relative_to(folder)) for path in found if path != folder / MARK]


def _state(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]
