"""The sending end of a refit, on a rank that passes the buckets on to workers of engines. The rank that drives an engine also
asks it to start reading."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from kdrl_mcore.errors import KdrlError, RefitError
from kdrl_mcore.parallel.interfaces import own_address
from kdrl_mcore.rollout.refit.stream import BucketEntry, Channel, num_bytes, remaining, same_token
from kdrl_mcore.rollout.refit.transport import SLOTS, Sender, make_sender

_POLL = 0.2
_HELLO = 5.0
"""Seconds for a new connection to identify itself."""
_LAST_WORDS = 5.0
"""Seconds for a server to report why it has closed the connection."""

Table = Mapping[str, tuple[Sequence[int], str]]
"""Shape and dtype of each tensor of the model, by its HF name."""


class WeightServer(Protocol):
    """An engine server as a refit sees it: its number, for messages, and its address, `host:port`."""

    index: int
    address: str | None

    def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Have its workers read the weights that `spec` announces, and return the report of each. Blocks."""


class WeightWriter:
    """Sends buckets to the worker of an engine that shares this rank's GPU (colocated), or to all workers of some servers. The
    first failure is kept in `error`; later buckets are dropped, so that the sending ranks stay in step."""

    def __init__(
        self,
        engines: Sequence[int],
        servers: Sequence[WeightServer],
        worker: int | None,
        version: int,
        table: Table,
        bucket_bytes: int,
        device: torch.device,
        deadline: float,
        peft_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Listen for the workers; `open` connects to them.

        Args:
            engines: numbers of the engines, for messages.
            servers: the engines' servers on the rank that drives them; empty on other ranks that serve their workers.
            worker: the one worker of a colocated engine that this rank serves through memory; it runs on this host, and on
                CUDA on this rank's GPU. None serves every worker of every server through the network.
            device: where the weights are.
            deadline: the `time.monotonic()` after which everything fails.
            peft_config: the adapter_config.json of adapters; None for whole weights.
        """
        self._peft_config = peft_config
        self.error: str | None = None
        self.address: list[Any] | None = None  # host, port and secret, for the workers
        self._engines, self._servers, self._worker = engines, servers, worker
        self._version, self._table = version, table
        self._bucket_bytes, self._device, self._deadline = bucket_bytes, device, deadline
        self._position = "the connection"
        self._published = 0
        self._channels: dict[tuple[int, int], Channel] = {}  # by server and worker
        self._replies: list[Future[list[dict[str, Any]]]] = []
        self._sender: Sender | None = None
        self._scratch: Tensor | None = None
        self._listening: socket.socket | None = None
        try:
            host = "127.0.0.1" if worker is not None else own_address(str(servers[0].address).rpartition(":")[0])
            self._listening = socket.create_server((host, 0), backlog=128)
            self.address = [host, self._listening.getsockname()[1], secrets.token_hex(16)]
        except OSError as error:
            self._fail(error)

    def open(self, addresses: Sequence[list[Any] | None]) -> None:
        """Ask the servers that this rank drives to start reading, and connect to the workers.

        Args:
            addresses: the address of each worker's writer, or one for all.
        """
        if self.error is not None:
            return
        try:
            self._open(addresses)
        except (OSError, EOFError, RuntimeError, KdrlError) as error:
            self._fail(error)
            if self._servers:  # the other writers wait for workers that may never connect
                for address in addresses:
                    if address is not None and address != self.address:
                        _report_to(address, self.error or "")

    def next_slot(self) -> Tensor:
        """The slot for the next bucket, after its receivers have read the previous content."""
        number = self._published
        if self.error is None and number >= SLOTS:
            try:
                for key, channel in self._channels.items():
                    self._expect_ack(key, channel, number - SLOTS)
            except (OSError, EOFError, KdrlError) as error:
                self._fail(error)
        if self._sender is None:
            if self._scratch is None:
                self._scratch = torch.empty(self._bucket_bytes, dtype=torch.uint8, device=self._device)
            return self._scratch
        return self._sender.slots[number % SLOTS]

    def publish(self, bucket: Sequence[BucketEntry]) -> None:
        """Send the bucket, which is complete in the slot that `next_slot` returned."""
        if self._sender is None:
            return
        self._position = bucket[0].name
        slot = self._published % SLOTS
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the bytes must be there before the message
        message = {"slot": slot, "entries": [[p.name, p.start, p.offset, p.length] for p in bucket]}
        try:
            for channel in self._channels.values():
                channel.send(message)
            self._sender.publish(slot, num_bytes(bucket))
            self._published += 1
        except (OSError, EOFError, RuntimeError) as error:
            self._fail(error)

    def finish(self, checksums: Mapping[str, str], digest: str) -> None:
        """Announce the end, and wait until every worker has loaded its tensors and reported the digest."""
        if self.error is not None:
            return
        self._position = "the end"
        try:
            for channel in self._channels.values():
                channel.send({"checksums": dict(checksums)})
            for number in range(max(0, self._published - SLOTS), self._published):
                for key, channel in self._channels.items():
                    self._expect_ack(key, channel, number)
            for server, reply in zip(self._servers, self._replies, strict=True):
                for worker, result in enumerate(_answer(reply, remaining(self._deadline))):
                    if result.get("digest") != digest:
                        found = result.get("digest")
                        raise RefitError(
                            f"worker {worker} of engine {server.index} reports digest {found} of what it received, not {digest}"
                        )
        except (OSError, EOFError, KdrlError) as error:
            self._fail(error)

    def close(self) -> None:
        """Close the connections; a worker that is still reading sees the end, and fails."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _open(self, addresses: Sequence[list[Any] | None]) -> None:
        """Send the requests, and describe to every worker that this rank serves its end of the transport."""
        if None in addresses:
            raise RefitError("another rank that serves its workers cannot listen for them")
        assert self.address is not None and self._listening is not None
        host, kind = self.address[0], "broadcast"
        if self._worker is not None:
            kind = {"cpu": "shared_memory", "cuda": "cuda_ipc"}[self._device.type]
        spec = {
            "addresses": addresses,
            "version": self._version,
            "timeout": remaining(self._deadline),
            "peft_config": self._peft_config,
        }
        self._replies = [
            _request(server, self._version, {**spec, "server": number}) for number, server in enumerate(self._servers)
        ]
        with self._listening:
            self._accept_workers(self._listening, len(addresses))
        self._sender = make_sender(kind, self._bucket_bytes, self._device, host, self._deadline)
        for index, channel in enumerate(self._channels.values()):
            channel.send(
                {
                    "transport": kind,
                    "bucket_bytes": self._bucket_bytes,
                    "tensors": self._table,
                    "description": self._sender.describe(index, len(self._channels)),
                }
            )
        self._sender.connect()

    def _accept_workers(self, listening: socket.socket, num_writers: int) -> None:
        """Wait until all workers have connected. Through the network, the first one of each server reports their number."""
        assert self.address is not None
        missing = {(number, self._worker or 0) for number in range(len(self._engines))}
        listening.settimeout(_POLL)
        while missing:
            number, worker = min(missing)
            self._position = f"the connection of worker {worker} of engine {self._engines[number]}"
            remaining(self._deadline)
            for reply in self._replies:
                if reply.done():
                    _answer(reply, 0.0)
                    raise EOFError("the request ended before anything was sent")
            try:
                channel = Channel(listening.accept()[0], min(self._deadline, time.monotonic() + _HELLO))
                hello = channel.receive()
            except (TimeoutError, EOFError):
                continue
            if not same_token(hello.get("token"), self.address[2]):
                channel.close()
                continue
            if "error" in hello:
                channel.close()
                raise RefitError(hello["error"])
            channel.extend(self._deadline)
            if self._worker is None:
                missing |= {(hello["server"], rank) for rank in range(hello["ranks"])} - self._channels.keys()
            elif hello["ranks"] != num_writers:
                channel.close()
                raise RefitError(f"it has {hello['ranks']} workers, but {num_writers} ranks serve them")
            missing.discard((hello["server"], hello["rank"]))
            self._channels[hello["server"], hello["rank"]] = channel
        self._channels = dict(sorted(self._channels.items()))

    def _expect_ack(self, key: tuple[int, int], channel: Channel, number: int) -> None:
        message = channel.receive()
        if message.get("read") != number:
            raise RefitError(f"worker {key[1]} of engine {self._engines[key[0]]} answered {message} instead of {number}")

    def _fail(self, error: Exception) -> None:
        """Keep the error, with the servers' own reports if they come soon, and disconnect the workers."""
        why = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        causes = []
        give_up = time.monotonic() + (0 if isinstance(error, TimeoutError) else _LAST_WORDS)
        for reply in self._replies:
            try:
                _answer(reply, max(0.0, min(give_up, self._deadline) - time.monotonic()))
            except TimeoutError:
                continue
            except RefitError as cause:
                causes.append(str(cause))
        names = ", ".join(f"engine {index}" for index in self._engines)
        self.error = f"at {self._position}: {'; '.join(causes) or f'{names}: {why}'}"
        self.close()


def _request(server: WeightServer, version: int, spec: Mapping[str, Any]) -> Future[list[dict[str, Any]]]:
    """Send a server the request in a thread that nothing has to wait for: even if the server hangs, this process can end."""
    reply: Future[list[dict[str, Any]]] = Future()

    def ask() -> None:
        try:
            reply.set_result(server.receive_weights(version, spec))
        except BaseException as error:  # the waiting thread raises it
            reply.set_exception(error)

    threading.Thread(target=ask, name="refit request", daemon=True).start()
    return reply


def _answer(reply: Future[list[dict[str, Any]]], timeout: float) -> list[dict[str, Any]]:
    """A server's answer. Raises TimeoutError, or RefitError with the message of any error that its client raised."""
    if not wait([reply], timeout).done:
        raise TimeoutError("no answer")
    error = reply.exception()
    if error is not None:
        raise RefitError(str(error)) from error
    return reply.result()


def _report_to(address: Sequence[Any], error: str) -> None:
    """Report to the writer at this address that its workers will not connect."""
    host, port, token = address
    with suppress(OSError, EOFError):  # it may be gone, or have its worker and see that connection end
        channel = Channel(socket.create_connection((host, port), timeout=_HELLO), time.monotonic() + _HELLO)
        channel.send({"token": token, "error": error})
        channel.close()
