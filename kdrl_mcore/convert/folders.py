"""Model folders: distinguish HF checkpoints from converted ones."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.convert.hf_files import INDEX, KEPT, HFWeights
from kdrl_mcore.convert.torch_dist import METADATA, TorchDistWeights, read_metadata
from kdrl_mcore.errors import CheckpointError, ModelError
from kdrl_mcore.model.families import config_folder, read_architecture

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's pointer from a checkpoint folder to the folder of one iteration."""
RELEASE = "release"
"""Megatron-LM's name for weights that come from no training iteration; conversion writes these."""
ADAPTED = ".lora_A."
"""In the name of an adapter's tensor."""


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


def open_weights(path: str | Path) -> HFWeights | TorchDistWeights:
    """The weights of a model folder of either kind.

    Raises:
        ModelError, CheckpointError: the folder is of neither kind, or damaged.
    """
    folder = torch_dist_folder(path)
    if folder is not None and any((Path(path) / name).is_file() for name in ("model.safetensors", INDEX)):
        raise ModelError(f"{path} holds a converted checkpoint and safetensors: remove one of the two")
    if folder is None:
        return HFWeights(path)
    if any(ADAPTED in name for name in read_metadata(folder).state_dict_metadata):
        raise CheckpointError(
            f"{path} holds adapters alone (student.lora), not the model that they belong to: take RUN/hf, which the run "
            "exports at its end with both, or RUN/adapter"
        )
    return TorchDistWeights(folder, read_architecture(path), config_folder(path) / KEPT)
