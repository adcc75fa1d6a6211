"""Which memory is a GPU's, who uses it, and how much of it is alive.

The mark is an attribute of the storage, which torch keeps as long as any tensor, view or saved tensor of it lives. Memory
without a mark is the host's. Of the host's memory only what is pinned is marked.
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
from tests.paper_cuda.syncs import place

_GRANULARITY = 512  # bytes: torch's caching allocator rounds up to it
_untyped_storage = torch.Tensor.untyped_storage
_MARK = "_paper_block"


class Use(NamedTuple):
    """Work that reads or writes a stretch of bytes of a block: number `tick` of a stream."""

    start: int
    stop: int
    stream: int
    tick: int
    writes: bool


class Block:
    """The memory of one storage.

    Attributes:
        index: the GPU; None for pinned host memory.
        made: by which operation, and where in kdrl_mcore.
    """

    def __init__(self, index: int | None, size: int, operation: str) -> None:
        self.index = index
        self.size = _rounded(size)
        self.made = f"{operation} at {place()}"
        self._stream = streams.current() if index is not None else streams.host
        self._own = {False: 0, True: 0}  # the last work of that stream that reads, that writes, any of it
        self._others: list[Use] = []
        self._recorded: set[int] = set()
        if index is not None:
            self.phase = ledger.allocate(self.size)

    def use(self, tensor: Tensor, stream: Stream, tick: int, *, writes: bool, operation: str) -> None:
        """Work number `tick` of the stream reads or writes what the tensor spans of it.

        Raises:
            PaperCudaError: other work that writes it, or that reads what is now written, may not be over yet.
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
        """`Tensor.record_stream`: the allocator waits for this stream, too, before it gives the memory to others."""
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
    """The bytes of its storage from its first to behind its last element."""
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
    """Live bytes of this process's GPU, with the peak of the process and of each phase."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.live = 0
        self.peak = 0
        self.phase = ""
        self.peaks: dict[str, int] = defaultdict(int)
        self.live_of_phase: dict[str, int] = defaultdict(int)

    def enter(self, phase: str) -> None:
        """What is allocated from now on belongs to this phase."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.live)

    def allocate(self, size: int) -> str:
        """More memory is alive; returns the phase."""
        with self._lock:
            self.live += size
            self.peak = max(self.peak, self.live)
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
            self.live_of_phase[self.phase] += size
            return self.phase

    def free(self, size: int, phase: str) -> None:
        """Memory of this phase is gone."""
        self.live -= size
        self.live_of_phase[phase] -= size

    def reset_peak(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        self.peak = self.live


ledger = Ledger()
violations: list[str] = []
"""What went wrong where nothing can be raised: the next operation does."""


class Anywhere:
    """The mark of memory that torch's own C++ code made without saying for whom: it is where the tensors are that it meets."""


ANYWHERE = Anywhere()


def mark_of(tensor: Tensor) -> Block | Anywhere | None:
    """What is known of the tensor's memory: None for ordinary host memory. A checkpoint's sharded tensor is where its shards
    are."""
    if type(tensor) is ShardedTensor:
        shards = tensor.local_shards()
        return mark_of(shards[0].tensor) if shards else None
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    return getattr(_untyped_storage(tensor), _MARK, None)


def set_mark(tensor: Tensor, mark: Block | Anywhere) -> None:
    """Say so."""
    setattr(_untyped_storage(tensor), _MARK, mark)


def index_of(tensor: Tensor) -> int | None:
    """The GPU that the tensor is on; None for the host."""
    mark = mark_of(tensor)
    return mark.index if isinstance(mark, Block) else None


def is_pinned(tensor: Tensor) -> bool:
    """Whether it is in pinned host memory."""
    mark = mark_of(tensor)
    return isinstance(mark, Block) and mark.index is None


def allocate(tensor: Tensor, index: int | None, operation: str) -> Block:
    """Mark fresh memory as a GPU's, or as pinned host memory."""
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
