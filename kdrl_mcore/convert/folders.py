"""Model folders: telling HF checkpoints from converted ones, and writing a folder so that it is complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdrl_mcore.convert.hf_files import HFWeights
from kdrl_mcore.convert.torch_dist import METADATA, TorchDistWeights
from kdrl_mcore.errors import CheckpointError, ModelError
from kdrl_mcore.model.families import read_architecture

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's pointer from a checkpoint folder to the folder of one iteration."""
RELEASE = "release"
"""Megatron-LM's name for weights that no training iteration made: what conversion writes."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def torch_dist_folder(path: str | Path) -> Path | None:
    """The torch_dist folder of a converted model or a training checkpoint, or None for an HF folder.

    Raises:
        CheckpointError: it points to an iteration that is not there.
    """
    path = Path(path)
    if (path / TRACKER).is_file():
        which = (path / TRACKER).read_text().strip()
        folder = path / (RELEASE if which == RELEASE else f"iter_{int(which):07d}" if which.isdigit() else which)
        if not folder.is_dir():
            raise CheckpointError(f"{path / TRACKER} names {which}, which is not there: the checkpoint is incomplete")
        return folder
    for folder in (path, path / "weights"):
        if (folder / METADATA).is_file():
            return folder
    return None


def config_folder(path: str | Path) -> Path:
    """Where config and tokenizer lie: in the folder itself, or in a training checkpoint's `model`."""
    path = Path(path)
    return path / "model" if (path / "model" / "config.json").is_file() else path


def open_weights(path: str | Path) -> HFWeights | TorchDistWeights:
    """The weights of a model folder, whichever kind it is.

    Raises:
        ModelError, CheckpointError: it is neither, or it is damaged.
    """
    folder = torch_dist_folder(path)
    return HFWeights(path) if folder is None else TorchDistWeights(folder, read_architecture(config_folder(path)))


@contextmanager
def written_aside(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well and is removed when it does not.

    Args:
        num_bytes: what will be written, roughly.

    Raises:
        ModelError: `target` holds something that is not a model, or there is no room.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file())):
        raise ModelError(f"{target} exists and is not a model folder: remove it or name another one")
    aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        yield aside
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(aside, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = "no space is left on the device" if error.errno in _NO_SPACE else "it failed"
        raise ModelError(f"cannot write {target}: {reason} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
