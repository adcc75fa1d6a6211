"""Read Megatron's torch_dist format in place: locate each chunk of each tensor, and unpickle only names, shapes and offsets.

A torch_dist folder is a torch.distributed.checkpoint (DCP): `.metadata` (a pickle of DCP's own classes) lists the chunks of
each tensor, with the `.distcp` file, offset and length of each; a stored chunk is what `torch.save` writes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.serialization import skip_data

from kdrl_mcore.convert.byte_ranges import ByteRange, Files, StoredTensor, num_elements
from kdrl_mcore.convert.hf_files import read_header
from kdrl_mcore.convert.weight_map import GlobalTensor, global_tensors
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.model.families import FAMILIES
from kdrl_mcore.model.families.base import Architecture

METADATA = ".metadata"
_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_ALLOWED = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's metadata classes and nothing else, because a pickle can name any function."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if module.startswith("megatron."):  # placeholders without fields, which Megatron-Core 0.15 and older stored
            return type(name, (), {})
        if dtype or (module, name) in _ALLOWED or (module in _ALLOWED_MODULES and isinstance(_find(module, name), type)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _find(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=["_"]), name, None) if "." not in name else None


def read_metadata(folder: Path) -> Metadata:
    """The `.metadata` of a torch_dist folder.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but metadata.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {METADATA}") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{path} is damaged, or is not checkpoint metadata: {error}") from error
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise CheckpointError(f"{path} does not describe a checkpoint")
    return metadata


class TorchDistWeights:
    """The weights of a torch_dist checkpoint of any layout under their HF names, read on demand, without vocabulary padding. A
    context manager: it keeps files open."""

    def __init__(self, folder: str | Path, tensors: Iterable[GlobalTensor], kept: Path | None = None) -> None:
        """Args:
            tensors: those to read.
            kept: a file with further tensors, which belong to no layer of the model; it need not exist.

        Raises:
            CheckpointError: the metadata is missing or damaged, or one chunk stores several layers or experts.
        """
        self.path = Path(folder)
        self.files = Files()
        self._archives = _Archives()
        metadata = read_metadata(self.path)
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data
        self._tensors = {
            key: stored for key, stored in metadata.state_dict_metadata.items() if isinstance(stored, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, tuple[int, ...]], list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
        self._of: dict[str, tuple[GlobalTensor, int]] = {}
        depth: dict[str, int] = {}
        for tensor in tensors:
            depth[tensor.key] = len(tensor.grid)
            if tensor.key in self._tensors:
                for index, name in enumerate(tensor.hf_names):
                    self._of[name] = (tensor, index)
        for key, lead in depth.items():
            for chunk in getattr(self._tensors.get(key), "chunks", ()):
                if any(size != 1 for size in chunk.sizes[:lead]):
                    raise CheckpointError(f"{self.path}: {key} is stored with several layers or experts in one chunk")
                self._chunks[key, tuple(chunk.offsets[:lead])].append((tuple(chunk.offsets), tuple(chunk.sizes)))
        self._expected_keys = set(depth)
        self._kept = read_header(kept) if kept is not None and kept.is_file() else {}
        self.names = frozenset({*self._of, *self._kept})

    @staticmethod
    def of_model(folder: str | Path, architecture: Architecture, kept: Path) -> TorchDistWeights:
        """The weights of a whole model. Arguments and errors are the constructor's."""
        return TorchDistWeights(folder, global_tensors(FAMILIES[architecture.family].rules(architecture), architecture), kept)

    @property
    def unexpected_keys(self) -> list[str]:
        """Tensors of the model (not of its optimizer) that the architecture does not have."""
        return sorted(
            key
            for key in self._tensors
            if key.startswith(("decoder.", "embedding.", "output_layer.")) and key not in self._expected_keys
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an HF tensor; if the stored tensor does not have the shape that the architecture expects, the stored
        shape."""
        if name in self._kept:
            return self._kept[name].shape
        tensor, index = self._tensor(name)
        size = tuple(self._tensors[tensor.key].size)[len(tensor.grid) :]
        whole = (*tensor.grid, *tensor.shape) == tuple(self._tensors[tensor.key].size)
        padded = tensor.key in ("embedding.word_embeddings.weight", "output_layer.weight") and size[1:] == tensor.shape[1:]
        return tensor.hf_shapes[index] if whole or (padded and size[0] >= tensor.shape[0]) else size

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of an HF tensor."""
        if name in self._kept:
            return self._kept[name].dtype
        return self._tensors[self._tensor(name)[0].key].properties.dtype

    def read(self, name: str, start: int, length: int, dim: int = 0) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of an HF tensor, in the checkpoint's dtype.

        Raises:
            CheckpointError: there is no such tensor, or some of its rows are not stored.
        """
        if name in self._kept:
            stored = self._kept[name]
            return (
                self.files.read_rows(stored, start, length)
                if dim == 0
                else self.files.read_block(stored, 0, stored.shape[0], start, length)
            )
        tensor, index = self._tensor(name)
        shape = tensor.hf_shapes[index]
        column, columns = (start, length) if dim == 1 else (0, num_elements(shape[1:]))
        first, end = (0, shape[0]) if dim == 1 else (start, start + length)
        parts = []
        for tensor_slice in sorted(tensor.slices, key=lambda tensor_slice: tensor_slice.hf_start):
            low, high = max(first, tensor_slice.hf_start), min(end, tensor_slice.hf_start + tensor_slice.length)
            if tensor_slice.hf == name and low < high:
                parts.append(self._block(tensor, tensor_slice.start + low - tensor_slice.hf_start, high - low, column, columns))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if len(shape) > 1 else whole.squeeze(1)

    def ranges(self, name: str, start: int, length: int) -> list[ByteRange] | None:
        """Where the bytes of these rows lie, in order; None if the checkpoint's layout splits rows."""
        if name in self._kept:
            stored = self._kept[name]
            return [ByteRange(stored.path, stored.offset + start * stored.row_bytes, length * stored.row_bytes)]
        tensor, _ = self._tensor(name)
        lead, result, found = len(tensor.grid), [], 0
        columns = num_elements(tensor.shape[1:])
        for tensor_slice in sorted(tensor.slices, key=lambda tensor_slice: tensor_slice.hf_start):
            low, high = max(start, tensor_slice.hf_start), min(start + length, tensor_slice.hf_start + tensor_slice.length)
            if tensor_slice.hf != name or low >= high:
                continue
            first = tensor_slice.start + low - tensor_slice.hf_start
            for offsets, sizes in sorted(self._chunks[tensor.key, tensor.position]):
                begin, rows = offsets[lead], sizes[lead]
                top, bottom = max(first, begin), min(first + high - low, begin + rows)
                if top >= bottom:
                    continue
                if num_elements(sizes[lead + 1 :]) != columns:
                    return None
                chunk = self._locate(tensor.key, offsets, sizes, (rows, columns))
                at, size = chunk.offset + (top - begin) * chunk.row_bytes, (bottom - top) * chunk.row_bytes
                result.append(ByteRange(chunk.path, at, size))
                found += bottom - top
        return result if found == length else None

    def _block(self, tensor: GlobalTensor, start: int, count: int, column: int, columns: int) -> Tensor:
        """[count, columns] of a Megatron tensor (a vector has one column), from all the chunks that hold them."""
        lead, found, result = len(tensor.grid), 0, None
        for offsets, sizes in self._chunks[tensor.key, tensor.position]:
            (first, rows), (left, width) = zip((*offsets[lead:], 0)[:2], (*sizes[lead:], 1)[:2], strict=True)
            low, high = max(start, first), min(start + count, first + rows)
            begin, end = max(column, left), min(column + columns, left + width)
            if low >= high or begin >= end:
                continue
            chunk = self._locate(tensor.key, offsets, sizes, (rows, width))
            part = self.files.read_block(chunk, low - first, high - low, begin - left, end - begin)
            found += part.numel()
            if part.shape == (count, columns):
                return part
            if result is None:
                result = torch.empty(count, columns, dtype=chunk.dtype)
            result[low - start : high - start, begin - column : end - column] = part
        if result is None or found != count * columns:
            raise CheckpointError(f"{self.path} does not hold all of {tensor.key} {list(tensor.position)}")
        return result

    def _locate(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> StoredTensor:
        stored = self._storage.get(MetadataIndex(key, torch.Size(offsets)))
        if stored is None:
            raise CheckpointError(f"{self.path}/{METADATA} does not locate {key} {list(offsets)}: the checkpoint is damaged")
        path = self.path / stored.relative_path
        if Path(stored.relative_path).name != stored.relative_path or not path.is_file():
            raise CheckpointError(f"{self.path} is incomplete: {stored.relative_path}, which holds {key}, does not exist")
        dtype = self._tensors[key].properties.dtype
        offset = self._archives.data_offset(self.files, path, stored.offset, stored.length, sizes, dtype)
        return StoredTensor(path, offset, shape, dtype)

    def _tensor(self, name: str) -> tuple[GlobalTensor, int]:
        if name not in self._of:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._of[name]

    def __enter__(self) -> TorchDistWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


class _Archives:
    """Where a tensor's bytes lie within the output of `torch.save` (a zip archive of a small pickle and the raw bytes)."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[Path, int], int] = {}
        self._checked: dict[bytes, tuple[tuple[int, ...], torch.dtype]] = {}

    def data_offset(
        self, files: Files, path: Path, offset: int, length: int, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> int:
        """The offset in the file.

        Raises:
            CheckpointError: the archive is damaged, or is not one plain tensor of this shape and dtype.
        """
        if (path, offset) not in self._offsets:
            try:
                within = self._parse(path, io.BufferedReader(_View(files, path, offset, length), 4096), sizes, dtype)
            except (zipfile.BadZipFile, KeyError, RuntimeError, pickle.UnpicklingError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short at byte {offset}: {error}") from error
            self._offsets[path, offset] = offset + within
        return self._offsets[path, offset]

    def _parse(self, path: Path, view: io.BufferedReader, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
        with zipfile.ZipFile(view) as archive:
            prefix = archive.namelist()[0].partition("/")[0]
            pickled = archive.read(f"{prefix}/data.pkl")
            data = archive.getinfo(f"{prefix}/data/0")
            if archive.read(f"{prefix}/byteorder") != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine")
        if pickled not in self._checked:
            view.seek(0)
            with skip_data():  # builds the tensor without its bytes
                tensor = torch.load(view, weights_only=True)
            plain = isinstance(tensor, Tensor) and tensor.is_contiguous() and tensor.storage_offset() == 0
            if not plain:
                raise CheckpointError(f"{path} holds something other than a plain contiguous tensor")
            self._checked[pickled] = (tuple(tensor.shape), tensor.dtype)
        if self._checked[pickled] != (sizes, dtype) or data.file_size != num_elements(sizes) * dtype.itemsize:
            raise CheckpointError(f"{path} holds a tensor whose shape or dtype differs from {METADATA}")
        view.seek(data.header_offset + 26)  # the local header's lengths of name and extra field
        name, extra = (int.from_bytes(view.read(2), "little") for _ in range(2))
        return data.header_offset + 30 + name + extra


class _View(io.RawIOBase):
    """A range of a file, readable as a file."""

    def __init__(self, files: Files, path: Path, offset: int, length: int) -> None:
        self._path, self._files, self._offset, self._length, self._at = path, files, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._files.read_into(memoryview(buffer)[:count], self._path, self._offset + self._at)
        self._at += count
        return count
