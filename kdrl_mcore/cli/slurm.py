"""Write the SLURM scripts to a folder, for an installed package.

    kdrl-slurm DIR [--overwrite]
    sbatch DIR/kdrl_32b.sh [key=value ...]        (docs/slurm.md)

Jobs run with the Python that wrote the scripts, unless KDRL_PYTHON or KDRL_CONTAINER is set. An existing folder is updated; a
script that you have changed is replaced only with --overwrite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from pathlib import Path

from kdrl_mcore.config import slurm_dir
from kdrl_mcore.errors import DataError, KdrlError

INTERPRETER = "interpreter"
"""The file with the path of the Python. From its presence the scripts also know that they are not in a checkout."""
RECORD = ".kdrl-slurm.json"
"""The record of what was written: the SHA-256 of each file, by name."""


def main(arguments: list[str]) -> int:
    """Write the scripts; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="kdrl-slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder, on a file system that all nodes share")
    parser.add_argument("--overwrite", action="store_true", help="also replace scripts that you changed")
    options = parser.parse_args(arguments)
    try:
        write_scripts(options.folder.expanduser(), overwrite=options.overwrite)
    except OSError as error:
        print(f"error: {error.filename or options.folder}: {error.strerror or error}", file=sys.stderr)
        return DataError.exit_code
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.folder}: sbatch {shlex.quote(str(options.folder / 'kdrl_32b.sh'))} [key=value ...]")
    return 0


def write_scripts(folder: Path, *, overwrite: bool = False) -> None:
    """Write the package's scripts to `folder`, with the path of this Python as the jobs' default.

    Raises:
        DataError: a file there has changed since this command wrote it, and `overwrite` is false; nothing is written.
        OSError: the folder cannot be written.
    """
    sources = {path.name: path for path in sorted(slurm_dir().iterdir()) if path.suffix in (".sh", ".py")}
    wanted = {name: path.read_bytes() for name, path in sources.items()} | {INTERPRETER: f"{sys.executable}\n".encode()}
    record = folder / RECORD
    written: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    there = {name: (folder / name).read_bytes() for name in wanted if (folder / name).exists()}
    changed = [name for name, content in there.items() if content != wanted[name] and _digest(content) != written.get(name)]
    if changed and not overwrite:
        raise DataError(
            f"{folder} holds {', '.join(changed)}, changed since kdrl-slurm wrote it: name another folder, or replace it with "
            "--overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in wanted.items():
        (folder / name).write_bytes(content)
        if name in sources:
            shutil.copymode(sources[name], folder / name)
    record.write_text(json.dumps({name: _digest(content) for name, content in wanted.items()}, indent=2) + "\n")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
