"""Model folders: distinguish HF checkpoints from converted ones, and from adapters."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.convert.torch_dist import METADATA
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.model.families import ADAPTER_CONFIG, config_folder

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's pointer from a checkpoint folder to the folder of one iteration."""
RELEASE = "release"
"""Megatron-LM's name for weights that come from no training iteration; conversion writes these."""
STATE_FILE = "trainer_state.json"
"""What a training checkpoint holds besides tensors."""


def torch_dist_folder(path: str | Path) -> Path | None:
    """The torch_dist folder of a converted model or a training checkpoint, or None for an HF folder.

    Raises:
        CheckpointError: the folder points to an iteration that does not exist.
    """
    path = Path(path)
    if (path / TRACKER).is_file():
        which = (path / TRACKER).read_text().strip()
        folder = path / (RELEASE if which == RELEASE else f"iter_{int(which):07d}" if which.isdigit() else which)
        if not folder.is_dir():
            raise CheckpointError(f"{path / TRACKER} names {which}, which does not exist: the checkpoint is incomplete")
        return folder
    for folder in (path, path / "weights"):
        if (folder / METADATA).is_file():
            return folder
    return None


def find_model(path: str | Path) -> Path:
    """The model folder that a path names: the path itself, or for a run its export (RUN/hf), or else its latest checkpoint.
    Any other path is returned unchanged."""
    path = Path(path)
    if not (config_folder(path) / "config.json").is_file():
        for found in (path / "hf", path / "checkpoints" / "latest", path / "latest"):
            if (config_folder(found) / "config.json").is_file():
                return found.resolve()
    return path


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder holds adapters in PEFT's format, without the model that they belong to."""
    path = Path(path)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
