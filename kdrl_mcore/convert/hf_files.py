"""HF checkpoints on disk: one safetensors file, or several with an index. Nothing is ever unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdrl_mcore.convert.byte_ranges import ByteRange, Files, StoredTensor, num_elements
from kdrl_mcore.errors import ModelError
from kdrl_mcore.parallel.dtypes import SAFETENSORS_DTYPES

INDEX = "model.safetensors.index.json"
KEPT = "kept.safetensors"
"""In a converted model or a training checkpoint: the tensors that belong to no layer of the model (`Architecture.keeps`)."""
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
"""The files of an HF model directory other than weights; they are copied from the model that a run started from."""
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Any of these files marks a folder as an adapter (PEFT)."""


class HFWeights:
    """The tensors of an HF checkpoint, read on demand slice by slice. A context manager: it keeps files open."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError: there are no safetensors, the index names absent files or tensors, a file is cut short, or the
        folder holds other weights that some program would read instead."""
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
                if shards := sorted(self.path.glob("model-*.safetensors")):
                    raise ModelError(f"{self.path} holds {shards[0].name}, but not {INDEX}: copy it from the original model")
                raise ModelError(f"{self.path} has no weights: it holds neither model.safetensors nor {INDEX}")
        _refuse_rivals(self.path, names)
        self._tensors: dict[str, StoredTensor] = {}
        for name in names:
            if not (self.path / name).is_file():
                raise ModelError(f"{index} names {name}, which does not exist: the checkpoint is incomplete")
            found = read_header(self.path / name)
            for twice in found.keys() & self._tensors.keys():
                raise ModelError(
                    f"{self.path}: both {self._tensors[twice].path.name} and {name} hold {twice}: remove one of them"
                )
            self._tensors.update(found)
        for name, file in (named or {}).items():
            if name not in self._tensors or self._tensors[name].path.name != file:
                raise ModelError(f"{index} says that {name} is in {file}, which does not hold it")
        self.names = frozenset(self._tensors)
        unlisted = sorted(set(self._tensors) - set(named)) if named else []
        if unlisted:
            raise ModelError(f"{self._tensors[unlisted[0]].path} holds {unlisted[0]}, which {INDEX} does not name")

    def read(self, name: str, start: int, length: int, dim: int = 0) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of a tensor, in the file's dtype.

        Raises:
            ModelError: no such tensor.
        """
        stored = self._locate(name)
        if dim == 0:
            return self.files.read_rows(stored, start, length)
        return self.files.read_block(stored, 0, stored.shape[0], start, length)

    def ranges(self, name: str, start: int, length: int) -> list[ByteRange]:
        """Where the bytes of these rows lie."""
        stored = self._locate(name)
        return [ByteRange(stored.path, stored.offset + start * stored.row_bytes, length * stored.row_bytes)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._locate(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._locate(name).dtype

    def _locate(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise ModelError(f"{self.path} has no tensor {name}")
        return self._tensors[name]

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def unread_files(path: str | Path) -> list[str]:
    """Files of weights in a model folder that are never read, such as pickled copies."""
    path = Path(path)
    ends = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.safetensors")
    return sorted(
        file.name for end in ends for file in path.glob(end) if not _is_weights(file) and file.name != "training_args.bin"
    )


def _is_weights(file: Path) -> bool:
    return file.name == KEPT or (file.name.startswith("model") and file.suffix == ".safetensors")


def _refuse_rivals(path: Path, names: list[str]) -> None:
    """Refuse weights that other programs would read instead of these, or in addition to them.

    Raises:
        ModelError: the folder holds an adapter, or safetensors of the model that do not belong to those that are read.
    """
    adapter = next((name for name in ADAPTERS if (path / name).is_file()), None)
    if adapter is not None:
        raise ModelError(
            f"{path} holds an adapter ({adapter}) besides weights and would ignore it: merge it into the weights, or move it"
        )
    rival = next((file.name for file in sorted(path.glob("model*.safetensors")) if file.name not in names), None)
    if rival is not None:
        read = INDEX if (path / INDEX).is_file() else names[0]
        raise ModelError(f"{path} holds {rival}, which does not belong to {read}: remove the one left over from another save")


def _read_index(index: Path) -> dict[str, str]:
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not a valid index of safetensors files: {error!r}") from error
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ModelError(f"{index} is not a valid index of safetensors files: its weight_map names none")
    outside = [file for file in named.values() if Path(file).name != file]
    if outside:
        raise ModelError(f"{index} names {outside[0]}, which is not a file next to it")
    return named


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file lies (https://huggingface.co/docs/safetensors: eight bytes with the header's
    length, the header in JSON, the data)."""
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks that the header is valid and that the file has all its bytes
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ModelError(
                f"{path}: {name} is {entry['dtype']}, and only {', '.join(SAFETENSORS_DTYPES)} weights are supported"
            )
    return {
        name: StoredTensor(
            path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]]
        )
        for name, entry in header.items()
    }


Described = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors by name: shape and dtype."""


def split_into_shards(tensors: Described, max_bytes: int) -> list[list[str]]:
    """Distribute tensors over files of at most `max_bytes` (or one tensor), in order."""
    shards: list[list[str]] = [[]]
    free = max_bytes
    for name, (shape, dtype) in tensors.items():
        size = num_elements(shape) * dtype.itemsize
        if size > free and shards[-1]:
            shards.append([])
            free = max_bytes
        shards[-1].append(name)
        free -= size
    return shards


def shard_name(number: int, count: int) -> str:
    """The file name that HF gives the `number`th (from 1) of `count` files."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def lay_out(path: Path, tensors: Described) -> dict[str, StoredTensor]:
    """Write a safetensors file's header and extend the file to its final length; the tensors' bytes are filled in later."""
    dtype_names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    entries: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + num_elements(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    begin = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(begin + at)
    return {
        name: StoredTensor(path, begin + entries[name]["data_offsets"][0], shape, dtype)
        for name, (shape, dtype) in tensors.items()
    }


def write_index(folder: Path, shards: list[list[str]], total: int) -> None:
    """Write the index of several files; a single file needs none."""
    if len(shards) > 1:
        weight_map = {name: shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy an HF directory's files other than weights: config, tokenizer, generation config, chat template."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy the side files, and set the weights' dtype in the config."""
    copy_side_files(source, target)
    config = json.loads((target / "config.json").read_text())
    key, name = "dtype" if "dtype" in config else "torch_dtype", str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        config[key] = name
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
