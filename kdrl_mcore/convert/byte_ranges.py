"""Tensors in files as row-major bytes at an offset, read a block of rows at a time, never mapped into memory or unpickled."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kdrl_mcore.errors import ModelError

NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)
"""The errors of `os.copy_file_range` where it is not supported and bytes must be read and written instead."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a file holds a tensor, and its shape and dtype."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (for a vector, of one element)."""
        return num_elements(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file."""

    path: Path
    offset: int
    length: int


def num_elements(shape: tuple[int, ...]) -> int:
    """The product of the sizes."""
    product = 1
    for size in shape:
        product *= size
    return product


def raw_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in row-major order, as uint8."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def write_at(file: BinaryIO | RawIOBase, data: Tensor, offset: int) -> None:
    """Write bytes at an offset of an open file."""
    view = data.numpy().data
    while len(view):
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


class Files:
    """Files that stay open for reading by many threads. A context manager."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, path: Path, offset: int) -> None:
        """Fill a buffer with the bytes at an offset.

        Raises:
            ModelError: the file is too short.
        """
        descriptor, done = self._descriptor(path), 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise ModelError(f"{path} is cut short: it ends before byte {offset + len(buffer)}")
            done += count

    def read_rows(self, stored: StoredTensor, start: int, count: int) -> Tensor:
        """`count` rows of a stored tensor, in its dtype."""
        data = torch.empty(count * stored.row_bytes, dtype=torch.uint8)
        self.read_into(data.numpy().data, stored.path, stored.offset + start * stored.row_bytes)
        return data.view(stored.dtype).view(count, *stored.shape[1:])

    def read_block(self, stored: StoredTensor, start: int, count: int, column: int, columns: int) -> Tensor:
        """`columns` columns of `count` rows of a stored matrix. Reads nothing else."""
        if columns == stored.shape[1]:
            return self.read_rows(stored, start, count)
        width, size = columns * stored.dtype.itemsize, stored.dtype.itemsize
        data = torch.empty(count * width, dtype=torch.uint8)
        view = data.numpy().data
        for row in range(count):
            offset = stored.offset + (start + row) * stored.row_bytes + column * size
            self.read_into(view[row * width : (row + 1) * width], stored.path, offset)
        return data.view(stored.dtype).view(count, columns)

    def copy(self, source: ByteRange, target: int, offset: int) -> None:
        """Copy bytes to an offset of another file (a descriptor) within the kernel.

        Raises:
            ModelError: the source is too short.
            OSError: the target cannot be written, or the file systems do not support such a copy (`NO_KERNEL_COPY`).
        """
        descriptor, done = self._descriptor(source.path), 0
        while done < source.length:
            count = os.copy_file_range(descriptor, target, source.length - done, source.offset + done, offset + done)
            if count == 0:
                raise ModelError(f"{source.path} is cut short: it ends before byte {source.offset + source.length}")
            done += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
