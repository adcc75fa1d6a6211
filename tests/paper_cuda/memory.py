"""Which memory is a GPU's, who uses it, and how much of it is allocated.

The mark is an attribute of the storage, which torch keeps as long as any tensor, view or saved tensor of it lives. Memory
without a mark is host memory; only pinned host memory has a mark.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.paper_cuda import streams
from tests.paper_cuda.streams import PaperCudaError, Stream
from tests.paper_cuda.syncs import own_line

_GRANULARITY = 512  # bytes; torch's caching allocator rounds up to a multiple
_untyped_storage = torch.Tensor.untyped_storage
_MARK = "_paper_block"


class Use(NamedTuple):
    """Work item number `tick` of a stream, which reads or writes a range of bytes of a block."""

    start: int
    stop: int
    stream: int
    tick: int
    writes: bool


class Block:
    """The memory of one storage.

    Attributes:
        index: the GPU; None for pinned host memory.
        made: the operation that allocated it, and its line in kdrl_mcore.
    """

    def __init__(self, index: int | None, size: int, operation: str) -> None:
        self.index = index
        self.size = _rounded(size)
        self.made = f"{operation} at {own_line()}"
        self._stream = streams.current() if index is not None else streams.host
        self._own = {False: 0, True: 0}  # that stream's last work that reads, and that writes, any of it
        self._others: list[Use] = []
        self._recorded: set[int] = set()
        if index is not None:
            self.phase = ledger.allocate(self.size)

    def use(self, tensor: Tensor, stream: Stream, tick: int, *, writes: bool, operation: str) -> None:
        """Record that work number `tick` of the stream reads or writes the tensor's part of the block.

        Raises:
            PaperCudaError: other work that writes it, or that reads what is now written, may not have finished.
        """
        is_own = stream is self._stream
        if is_own and not self._others:
            self._own[writes] = tick
            return
        start, stop = _span(tensor)
        mine = Use(start, stop, stream.id, tick, writes)
        before = self._others if is_own else [*self._others, *self._own_uses()]
        for other in before:
            conflicts = (writes or other.writes) and other.start < stop and start < other.stop
            if conflicts and other.stream != stream.id and not _is_over(other, stream):
                does, did = "writes" if writes else "reads", "write" if other.writes else "read"
                raise PaperCudaError(
                    f"{operation} on {_name(stream.id)} {does} what {_name(other.stream)} may still {did}: {self}"
                )
        self._others = [other for other in self._others if not (writes and start <= other.start and other.stop <= stop)]
        self._others = [other for other in self._others if not _is_over(other, streams.host)]
        if is_own:
            self._own[writes] = tick
        else:
            self._others.append(mine)

    def _own_uses(self) -> Iterator[Use]:
        for writes, tick in self._own.items():
            if tick:
                yield Use(0, self.size, self._stream.id, tick, writes)

    def record_stream(self, stream: Stream) -> None:
        """`Tensor.record_stream`: the allocator also waits for this stream before it reuses the memory."""
        self._recorded.add(stream.id)

    def resize(self, size: int) -> None:
        """`UntypedStorage.resize_`."""
        if self.index is not None:
            ledger.free(self.size, self.phase)
            self.size = _rounded(size)
            self.phase = ledger.allocate(self.size)

    def __del__(self) -> None:
        if self.index is None:  # the allocator of pinned memory waits by itself
            return
        ledger.free(self.size, self.phase)
        for use in self._others:
            if use.stream not in self._recorded and not _is_over(use, self._stream) and not _is_over(use, streams.host):
                violations.append(f"memory is freed while {_name(use.stream)} may still use it, without record_stream: {self}")

    def __repr__(self) -> str:
        kind = "pinned host" if self.index is None else f"cuda:{self.index}"
        return f"{self.size} bytes of {kind} memory, made by {self.made}"


def _rounded(size: int) -> int:
    return -(-size // _GRANULARITY) * _GRANULARITY


def _span(tensor: Tensor) -> tuple[int, int]:
    """The range of bytes of its storage from its first element to the end of its last."""
    start = tensor.storage_offset() * tensor.element_size()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _is_over(use: Use, stream: Stream) -> bool:
    return stream.clock.get(use.stream, 0) >= use.tick


def _name(stream: int) -> str:
    return "the host" if stream == streams.HOST_ID else "the default stream" if stream == 0 else f"stream {stream}"


class Ledger:
    """Allocated bytes of this process's GPU, with the peak of the process and of each phase."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.live = 0
        self.peak = 0
        self.phase = ""
        self.peaks: dict[str, int] = defaultdict(int)
        self.live_of_phase: dict[str, int] = defaultdict(int)

    def enter(self, phase: str) -> None:
        """Count what is allocated from now on towards this phase."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.live)

    def allocate(self, size: int) -> str:
        """Record an allocation; returns the phase."""
        with self._lock:
            self.live += size
            self.peak = max(self.peak, self.live)
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
            self.live_of_phase[self.phase] += size
            return self.phase

    def free(self, size: int, phase: str) -> None:
        """Record that memory of this phase has been freed."""
        self.live -= size
        self.live_of_phase[phase] -= size

    def reset_peak(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        self.peak = self.live


ledger = Ledger()
violations: list[str] = []
"""Violations found where no error can be raised: the next operation raises it."""


class Anywhere:
    """The mark of memory that torch's C++ code allocated without naming a device: it counts as being on the device of the
    tensors it is used with."""


ANYWHERE = Anywhere()


def mark_of(tensor: Tensor) -> Block | Anywhere | None:
    """The mark of the tensor's memory; None for ordinary host memory. A checkpoint's sharded tensor is where its shards are."""
    if type(tensor) is ShardedTensor:
        shards = tensor.local_shards()
        return mark_of(shards[0].tensor) if shards else None
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    return getattr(_untyped_storage(tensor), _MARK, None)


def set_mark(tensor: Tensor, mark: Block | Anywhere) -> None:
    """Mark the tensor's memory."""
    setattr(_untyped_storage(tensor), _MARK, mark)


def index_of(tensor: Tensor) -> int | None:
    """The GPU that the tensor is on; None for the host."""
    mark = mark_of(tensor)
    return mark.index if isinstance(mark, Block) else None


def is_pinned(tensor: Tensor) -> bool:
    """Whether the tensor is in pinned host memory."""
    mark = mark_of(tensor)
    return isinstance(mark, Block) and mark.index is None


def allocate(tensor: Tensor, index: int | None, operation: str) -> Block:
    """Mark new memory as a GPU's, or as pinned host memory."""
    block = Block(index, _untyped_storage(tensor).nbytes(), operation)
    set_mark(tensor, block)
    return block


def storage_block(storage: Any) -> Block | None:
    """The block of an untyped storage."""
    mark = getattr(storage, _MARK, None)
    return mark if isinstance(mark, Block) else None


def mark_storage(storage: Any, index: int, operation: str) -> None:
    """Mark a storage as a GPU's memory."""
    setattr(storage, _MARK, Block(index, storage.nbytes(), operation))
