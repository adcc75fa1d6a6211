"""The receiving end of a refit, in a worker of an engine."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.refit.stream import Channel, checksum, digest
from kdrl_mcore.rollout.refit.transport import Receiver, make_receiver


class WeightReader:
    """The tensors that a trainer sends, under their HF names. They are copies and may be kept: none is part of a bucket."""

    def __init__(self, spec: dict, rank: int, ranks: int, device: torch.device) -> None:
        """Connect to the sender.

        Args:
            spec: what `WeightWriter` passed to the server.
            rank, ranks: this worker's rank in its server, and the number of workers.

        Raises:
            RefitError: no writer listens at the address, or none serves this worker.
        """
        self.result: dict = {}
        self._rank = rank
        self._device = device
        self._deadline = time.monotonic() + spec["timeout"]
        self._receiver: Receiver | None = None
        self._position = "the connection"
        addresses = spec["addresses"]  # of each worker's writer, or one for all
        if len(addresses) not in (1, ranks):
            raise RefitError(f"the engine has {ranks} workers, but {len(addresses)} ranks serve them")
        host, port, token = addresses[rank % len(addresses)]
        try:
            connected = socket.create_connection((host, port), timeout=spec["timeout"])
            self._channel = Channel(connected, self._deadline)
            self._channel.send({"token": token, "server": spec["server"], "rank": rank, "ranks": ranks})
        except (OSError, EOFError) as error:
            raise self._error(error) from error

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once all its bytes are read; `result` is set after the last one.

        Raises:
            RefitError: the sender is gone or too slow, or a tensor is missing, unknown or damaged. The message names the
                tensor.
        """
        try:
            yield from self._read()
        except (OSError, EOFError, RuntimeError) as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Disconnect; the sender notices if it had not finished."""
        self._channel.close()
        if self._receiver is not None:
            self._receiver.close()

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        opening = self._channel.receive()
        table = {name: (tuple(shape), dtype) for name, (shape, dtype) in opening["tensors"].items()}
        self._receiver = make_receiver(
            opening["transport"],
            opening["description"],
            opening["bucket_bytes"],
            self._device,
            self._channel.host,
            self._deadline,
        )
        sums: dict[str, str] = {}
        partial: dict[str, tuple[Tensor, int]] = {}  # an incomplete tensor's bytes, and how many have arrived
        num_bytes = number = 0
        while "entries" in (message := self._channel.receive()):
            entries = message["entries"]
            self._position = entries[0][0]
            data = self._receiver.take(message["slot"], entries[-1][2] + entries[-1][3])
            whole = []
            for name, start, offset, length in entries:
                if name not in table:
                    raise RefitError(f"tensor {name} was not announced")
                expected = _num_bytes(*table[name])
                bytes_N, have = partial.pop(name, (data.new_empty(expected), 0)) if name not in sums else (data, -1)
                if start != have or start + length > expected:
                    raise RefitError(f"bytes {start} to {start + length} of tensor {name} arrived out of order")
                bytes_N[start : start + length].copy_(data[offset : offset + length])
                if start + length < expected:
                    partial[name] = (bytes_N, start + length)
                else:
                    whole.append((name, bytes_N))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._channel.send({"read": number})
            number += 1
            for name, bytes_N in whole:
                sums[name] = checksum(bytes_N)
                num_bytes += len(bytes_N)
                shape, dtype = table[name]
                yield name, bytes_N.view(getattr(torch, dtype)).view(shape)
        _compare(sums, table.keys(), message["checksums"])
        self.result = {"digest": digest(table, sums), "tensors": len(sums), "bytes": num_bytes}

    def _error(self, error: Exception) -> RefitError:
        why = "the sender does not answer" if isinstance(error, TimeoutError) else str(error)
        return RefitError(f"worker {self._rank}, at {self._position}: {why}")


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize


def _compare(received: dict[str, str], announced: object, sent: dict[str, str]) -> None:
    assert isinstance(announced, type({}.keys()))
    for name in sorted(announced | sent.keys()):
        if name not in received:
            raise RefitError(f"tensor {name} is missing: it was announced but did not arrive")
        if received[name] != sent.get(name):
            raise RefitError(f"tensor {name} is damaged: its checksum is {received[name]} here, {sent.get(name)} at the sender")
