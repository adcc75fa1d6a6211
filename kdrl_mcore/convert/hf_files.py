"""HF checkpoints on disk: safetensors files, one or many with an index. Nothing is ever unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdrl_mcore.errors import ModelError

INDEX = "model.safetensors.index.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What an HF model directory holds beside its weights; copied from the model a run started from."""


class HFWeights:
    """Slices of the tensors of an HF checkpoint, read on demand. A context manager: it keeps files open."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError: no safetensors, an index that names absent files, or a file that is cut short."""
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self.file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for name in sorted(set(file_of.values())):
                if not (self.path / name).is_file():
                    raise ModelError(f"{index} names {name}, which is not there: the checkpoint is incomplete")
            return file_of
        single = "model.safetensors"
        if not (self.path / single).is_file():
            pickled = any(self.path.glob("*.bin")) or any(self.path.glob("*.pt"))
            hint = (
                "only pickled weights, which are never loaded: convert them to safetensors"
                if pickled
                else "no model.safetensors"
            )
            raise ModelError(f"{self.path}: {hint}")
        return dict.fromkeys(self._open(single).keys(), single)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.path / name, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ModelError(f"{self.path / name} is damaged or cut short: {error}") from error
        return self._files[name]

    def read(self, name: str, start: int, length: int, dim: int) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of a tensor, in the file's dtype; only these bytes are read.

        Raises:
            ModelError: no such tensor.
        """
        if name not in self.file_of:
            raise ModelError(f"{self.path} has no tensor {name}")
        tensor = self._open(self.file_of[name]).get_slice(name)
        return tensor[start : start + length] if dim == 0 else tensor[:, start : start + length]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        if name not in self.file_of:
            raise ModelError(f"{self.path} has no tensor {name}")
        return tuple(self._open(self.file_of[name]).get_slice(name).get_shape())

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything but the weights of an HF directory: config, tokenizer, generation config, chat template."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy the side files, and name the weights' dtype in the config."""
    copy_side_files(source, target)
    config = json.loads((target / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
