"""The data of a refit: tensors under their HF names, each with a checksum, cut into buckets of bytes; and the channel that
describes each bucket to the receivers.

This file, the transport and the reader run in an engine's process: nothing here imports Megatron-Core or vLLM.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

_LENGTH = struct.Struct("!Q")
_LARGEST_MESSAGE = 2**28
_CHECKSUM_WORDS = 2**22


@dataclass(frozen=True)
class BucketEntry:
    """Bytes `start` to `start + length` of the tensor `name`, which are at `offset` in their bucket."""

    name: str
    start: int
    offset: int
    length: int


def cut(sizes: Mapping[str, int], bucket_bytes: int) -> Iterator[list[BucketEntry]]:
    """Put tensors, given by their sizes in bytes, into buckets one after another. All buckets but the last are full; a tensor
    may span several."""
    bucket: list[BucketEntry] = []
    used = 0
    for name, size in sizes.items():
        start = 0
        while start < size:
            length = min(size - start, bucket_bytes - used)
            bucket.append(BucketEntry(name, start, used, length))
            start, used = start + length, used + length
            if used == bucket_bytes:
                yield bucket
                bucket, used = [], 0
    if bucket:
        yield bucket


def num_bytes(bucket: Sequence[BucketEntry]) -> int:
    """The used bytes of a bucket."""
    return bucket[-1].offset + bucket[-1].length


def checksum(data_N: Tensor) -> str:
    """The checksum of a tensor's bytes: XXH3 in host memory, and on a device a sum computed there, so that the bytes need not
    leave it. Sender and receiver of a refit have the same kind of device."""
    if data_N.device.type == "cpu":
        return f"{xxhash.xxh3_64_intdigest(data_N.numpy().data):016x}"
    return device_checksum(data_N)


def device_checksum(data_N: Tensor) -> str:
    """sum_i word_i (2i + 1) (2^31 - 1) mod 2^64 over words of eight bytes. The factors are odd, so that a change of any one
    word changes the sum, and distinct, so that a change of order does too."""
    tail = -len(data_N) % 8
    if tail:
        data_N = torch.cat([data_N, data_N.new_zeros(tail)])
    words, total = data_N.view(torch.int64), torch.zeros((), dtype=torch.int64, device=data_N.device)
    for begin in range(0, len(words), _CHECKSUM_WORDS):
        block = words[begin : begin + _CHECKSUM_WORDS]
        factors = torch.arange(begin, begin + len(block), device=block.device).mul_(2).add_(1).mul_(2**31 - 1)
        total += (block * factors).sum()
    return f"{total.item() % 2**64:016x}"


def digest(tensors: Mapping[str, tuple[Sequence[int], str]], checksums: Mapping[str, str]) -> str:
    """A digest of all weights: SHA-256 over the name, dtype, shape and checksum of each tensor, independent of their order."""
    lines = sorted(f"{name} {dtype} {list(shape)} {checksums[name]}" for name, (shape, dtype) in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Channel:
    """JSON messages over a connected socket, until a deadline."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        """Args:
        deadline: the `time.monotonic()` after which every call fails.
        """
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._deadline = deadline

    @property
    def host(self) -> str:
        """This side's address."""
        return self._socket.getsockname()[0]

    def extend(self, deadline: float) -> None:
        """Move the deadline."""
        self._deadline = deadline

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message. Raises TimeoutError after the deadline, OSError or EOFError if the other side is gone."""
        data = json.dumps(message).encode()
        self._socket.settimeout(remaining(self._deadline))
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> dict:
        """The next message. Raises as `send` does."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _LARGEST_MESSAGE:
            raise EOFError("the other side does not speak this protocol")
        message = json.loads(self._read(length))
        assert isinstance(message, dict)
        return message

    def close(self) -> None:
        """Close the connection; the other side sees its end."""
        self._socket.close()

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._socket.settimeout(remaining(self._deadline))
            more = self._socket.recv(length - len(data))
            if not more:
                raise EOFError("the other side closed the connection")
            data += more
        return bytes(data)


def remaining(deadline: float) -> float:
    """Seconds until a deadline. Raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time-out has passed")
    return left


def same_token(given: object, expected: str) -> bool:
    """Whether a peer knows the secret of this refit."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())
