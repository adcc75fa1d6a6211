"""HF checkpoints on disk: safetensors files, one or many with an index. Nothing is ever unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdrl_mcore.convert.extent import ByteRange, Extent, Files, num_elements
from kdrl_mcore.errors import ModelError

INDEX = "model.safetensors.index.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What an HF model directory holds beside its weights; copied from the model a run started from."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes of weights, as safetensors spells them."""


class HFWeights:
    """Slices of the tensors of an HF checkpoint, read on demand. A context manager: it keeps files open."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError: no safetensors, an index that names absent files or tensors, or a file that is cut short."""
        self.path = Path(path)
        self.files = Files()
        index = self.path / INDEX
        named: dict[str, str] | None = None
        if index.is_file():
            named = _read_index(index)
            names = sorted(set(named.values()))
        else:
            names = ["model.safetensors"]
            if not (self.path / names[0]).is_file():
                pickled = [each for end in ("*.bin", "*.pt", "*.pth") for each in self.path.glob(end)]
                if pickled:
                    raise ModelError(
                        f"{self.path} has only pickled weights ({pickled[0].name}), which are never loaded: convert them to "
                        "safetensors"
                    )
                raise ModelError(f"{self.path} has no weights: neither model.safetensors nor {INDEX} is there")
        self._extents: dict[str, Extent] = {}
        for name in names:
            if not (self.path / name).is_file():
                raise ModelError(f"{index} names {name}, which is not there: the checkpoint is incomplete")
            self._extents.update(_read_header(self.path / name))
        for name, file in (named or {}).items():
            if name not in self._extents or self._extents[name].path.name != file:
                raise ModelError(f"{index} says that {name} is in {file}, which does not hold it")
        self.names = frozenset(self._extents)
        unlisted = sorted(set(self._extents) - set(named)) if named else []
        if unlisted:
            raise ModelError(f"{self._extents[unlisted[0]].path} holds {unlisted[0]}, which {INDEX} does not name")

    def read(self, name: str, start: int, length: int, dim: int = 0) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of a tensor, in the file's dtype.

        Raises:
            ModelError: no such tensor.
        """
        extent = self._extent(name)
        if dim == 0:
            return self.files.read_rows(extent, start, length)
        return self.files.read_block(extent, 0, extent.shape[0], start, length)

    def ranges(self, name: str, start: int, length: int) -> list[ByteRange]:
        """Where the bytes of these rows lie."""
        extent = self._extent(name)
        return [ByteRange(extent.path, extent.offset + start * extent.row_bytes, length * extent.row_bytes)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._extent(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._extent(name).dtype

    def _extent(self, name: str) -> Extent:
        if name not in self._extents:
            raise ModelError(f"{self.path} has no tensor {name}")
        return self._extents[name]

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def _read_index(index: Path) -> dict[str, str]:
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not a valid index of safetensors files: {error!r}") from error
    outside = [file for file in named.values() if Path(file).name != file]
    if outside:
        raise ModelError(f"{index} names {outside[0]}, which is not a file beside it")
    return named


def _read_header(path: Path) -> dict[str, Extent]:
    """Where each tensor of a safetensors file lies (https://huggingface.co/docs/safetensors: eight bytes of length, then
    JSON, then data)."""
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks that the header is sound and that the file has all its bytes
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ModelError(f"{path}: {name} is {entry['dtype']}, and only {', '.join(DTYPES)} weights are supported")
    return {
        name: Extent(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }


Described = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors by name: shape and dtype."""


def split_into_shards(tensors: Described, max_bytes: int) -> list[list[str]]:
    """Spread tensors over files of at most `max_bytes` (or one tensor), in order."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, (shape, dtype) in tensors.items():
        size = num_elements(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def shard_name(number: int, count: int) -> str:
    """The file name that HF gives the `number`th (from 1) of `count` files."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def lay_out(path: Path, tensors: Described) -> dict[str, Extent]:
    """Write a safetensors file's header and make the file as long as it will be; the tensors' bytes are filled in later."""
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + num_elements(shape) * dtype.itemsize
        entries[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    begin = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(begin + at)
    return {
        name: Extent(path, begin + entries[name]["data_offsets"][0], shape, dtype) for name, (shape, dtype) in tensors.items()
    }


def write_index(folder: Path, shards: list[list[str]], total: int) -> None:
    """Write the index of several files; a single one needs none."""
    if len(shards) > 1:
        weight_map = {name: shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything but the weights of an HF directory: config, tokenizer, generation config, chat template."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy the side files, and name the weights' dtype in the config."""
    copy_side_files(source, target)
    config = json.loads((target / "config.json").read_text())
    key, name = "dtype" if "dtype" in config else "torch_dtype", str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        config[key] = name
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
