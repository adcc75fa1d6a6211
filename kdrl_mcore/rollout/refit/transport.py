"""Transports that carry a bucket's bytes from a trainer's rank to the workers of engines, each with a sender and a receiver.

Both ends have two slots of `bucket_bytes`, so that one is filled while the other is read. `shared_memory`: host memory of one
host. `cuda_ipc`: memory of one GPU. `broadcast`: any hosts, over gloo or NCCL.
"""

from __future__ import annotations

import base64
import mmap
import os
import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.refit.stream import remaining
from kdrl_mcore.rollout.vllm.gpu_memory import plain_segments

SLOTS = 2


class Sender(Protocol):
    """The sending end."""

    slots: list[Tensor]

    def describe(self, index: int, count: int) -> dict:
        """What receiver `index` of `count` needs to open its end."""

    def connect(self) -> None:
        """Connect, once every receiver has its description."""

    def publish(self, slot: int, used: int) -> None:
        """Send the first `used` bytes of a slot, which are complete; the receivers have been notified."""

    def close(self) -> None:
        """Release all resources."""


class Receiver(Protocol):
    """The receiving end."""

    def take(self, slot: int, used: int) -> Tensor:
        """The bytes of a published slot; they stay valid until the receiver acknowledges them."""

    def close(self) -> None:
        """Release all resources."""


class SharedMemorySender:
    """Slots in memory that the receivers map as well. The memory has no name in the file system, so a killed process leaves
    nothing behind, and the size of /dev/shm does not matter."""

    def __init__(self, bucket_bytes: int) -> None:
        self._file = os.memfd_create("kdrl_mcore_refit")
        os.ftruncate(self._file, SLOTS * bucket_bytes)
        self.slots = _map_slots(self._file, bucket_bytes)

    def describe(self, index: int, count: int) -> dict:
        """See `Sender`."""
        return {"path": f"/proc/{os.getpid()}/fd/{self._file}"}

    def connect(self) -> None:
        """Nothing to do."""

    def publish(self, slot: int, used: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """See `Sender`."""
        self.slots = []
        os.close(self._file)


class SharedMemoryReceiver:
    """Slots in the sender's memory."""

    def __init__(self, description: dict, bucket_bytes: int) -> None:
        file = os.open(description["path"], os.O_RDWR)
        try:
            self._slots = _map_slots(file, bucket_bytes)
        finally:
            os.close(file)

    def take(self, slot: int, used: int) -> Tensor:
        """See `Receiver`."""
        return self._slots[slot][:used]

    def close(self) -> None:
        """See `Receiver`."""
        self._slots = []


def _map_slots(file: int, bucket_bytes: int) -> list[Tensor]:
    whole = torch.frombuffer(mmap.mmap(file, SLOTS * bucket_bytes), dtype=torch.uint8)
    return list(whole.split(bucket_bytes))


class CudaIpcSender:
    """Slots in GPU memory; the receivers, on the same GPU, map it by its CUDA IPC handles."""

    def __init__(self, bucket_bytes: int, device: torch.device) -> None:
        with plain_segments():
            self.slots = [torch.empty(bucket_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]

    def describe(self, index: int, count: int) -> dict:
        """See `Sender`. Every receiver gets its own handles, because a handle counts one reader."""
        shared = [slot.untyped_storage()._share_cuda_() for slot in self.slots]
        uuid = str(torch.cuda.get_device_properties(self.slots[0].device).uuid)
        return {"gpu": uuid, "slots": [[_to_json(value) for value in fields[1:]] for fields in shared]}

    def connect(self) -> None:
        """Nothing to do."""

    def publish(self, slot: int, used: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """See `Sender`."""
        self.slots = []


class CudaIpcReceiver:
    """Slots in the sender's memory, on this worker's own GPU."""

    def __init__(self, description: dict, device: torch.device) -> None:
        """Raises RefitError if the sender is on another GPU: every byte would have to cross between the GPUs."""
        own = str(torch.cuda.get_device_properties(device).uuid)
        if own != description["gpu"]:
            raise RefitError(
                f"the engine's worker runs on GPU {own}, the rank that serves it on GPU {description['gpu']}: the GPUs of a "
                "colocated engine must be those of its ranks, in the same order (CUDA_VISIBLE_DEVICES)"
            )
        self._slots = []
        for fields in description["slots"]:
            storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *(_from_json(value) for value in fields))
            self._slots.append(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))

    def take(self, slot: int, used: int) -> Tensor:
        """See `Receiver`."""
        return self._slots[slot][:used]

    def close(self) -> None:
        """See `Receiver`."""
        self._slots = []


def _to_json(value: Any) -> Any:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value


class BroadcastSender:
    """Rank 0 of a separate process group with all receivers."""

    def __init__(self, bucket_bytes: int, device: torch.device, host: str, deadline: float) -> None:
        """Args:
        host: this side's address for the receivers.
        """
        self.slots = [torch.empty(bucket_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._host, self._deadline, self._size = host, deadline, 1
        listening = socket.create_server((host, 0))
        self._port = listening.getsockname()[1]
        self._store: dist.Store | None = dist.TCPStore(
            host,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=remaining(deadline)),
            master_listen_fd=listening.detach(),
        )
        self._group: Any = None

    def describe(self, index: int, count: int) -> dict:
        """See `Sender`."""
        self._size = 1 + count
        return {"host": self._host, "port": self._port, "rank": 1 + index, "size": self._size}

    def connect(self) -> None:
        """Create the group."""
        assert self._store is not None
        self._group = _create_group(self._store, 0, self._size, self.slots[0].device, self._host, self._deadline)

    def publish(self, slot: int, used: int) -> None:
        """See `Sender`. Broadcasts the bytes."""
        _broadcast(self._group, self.slots[slot][:used], self._deadline)

    def close(self) -> None:
        """See `Sender`."""
        _abort(self._group)
        self.slots, self._group, self._store = [], None, None


class BroadcastReceiver:
    """Another rank of the sender's group, with its own slots."""

    def __init__(self, description: dict, bucket_bytes: int, device: torch.device, host: str, deadline: float) -> None:
        """Args:
        host: this side's address for the sender.
        """
        self._slots = [torch.empty(bucket_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._deadline = deadline
        store = dist.TCPStore(
            description["host"], description["port"], is_master=False, timeout=timedelta(seconds=remaining(deadline))
        )
        self._group = _create_group(store, description["rank"], description["size"], device, host, deadline)

    def take(self, slot: int, used: int) -> Tensor:
        """See `Receiver`."""
        _broadcast(self._group, self._slots[slot][:used], self._deadline)
        return self._slots[slot][:used]

    def close(self) -> None:
        """See `Receiver`."""
        _abort(self._group)
        self._slots, self._group = [], None


def _create_group(store: dist.Store, rank: int, size: int, device: torch.device, host: str, deadline: float) -> Any:
    """A process group outside torch's global ones: it must neither need nor change a default group on either side."""
    timeout = timedelta(seconds=remaining(deadline))
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(dist.PrefixStore("refit", store), rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timeout
    return gloo(dist.PrefixStore("refit", store), rank, size, options)


def _broadcast(group: Any, data: Tensor, deadline: float) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=remaining(deadline))
    work = group.broadcast([data], options)
    work.wait(timedelta(seconds=remaining(deadline)))


def _abort(group: Any) -> None:
    if group is not None and hasattr(group, "abort"):
        group.abort()


def make_sender(kind: str, bucket_bytes: int, device: torch.device, host: str, deadline: float) -> Sender:
    """The sending end of a transport: shared_memory, cuda_ipc or broadcast."""
    if kind == "shared_memory":
        return SharedMemorySender(bucket_bytes)
    if kind == "cuda_ipc":
        return CudaIpcSender(bucket_bytes, device)
    return BroadcastSender(bucket_bytes, device, host, deadline)


def make_receiver(
    kind: str, description: dict, bucket_bytes: int, device: torch.device, host: str, deadline: float
) -> Receiver:
    """The receiving end."""
    if kind == "shared_memory":
        return SharedMemoryReceiver(description, bucket_bytes)
    if kind == "cuda_ipc":
        return CudaIpcReceiver(description, device)
    return BroadcastReceiver(description, bucket_bytes, device, host, deadline)
