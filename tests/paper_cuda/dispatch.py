"""Every operation as torch dispatches it: where its tensors are, where its results go, and in which order it runs.

torch dispatches autograd's own operations too, and those of the C++ code behind Python's calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paper_cuda import streams
from tests.paper_cuda.memory import ANYWHERE, Anywhere, Block, allocate, mark_of, set_mark, violations
from tests.paper_cuda.operations import Operation, check_deterministic, describe, sync_of
from tests.paper_cuda.streams import PaperCudaError
from tests.paper_cuda.syncs import count_sync

_local = threading.local()
_CREATIONS = {"empty", "zeros", "ones", "full", "empty_strided", "arange", "rand", "randn", "eye", "scalar_tensor"}


class Placement:
    """Where the Python call in progress puts its result.

    Attributes:
        index: the GPU; None for host memory.
        pinned: whether it is in pinned host memory.
        non_blocking: whether the host need not wait for a copy to there.
    """

    def __init__(self, index: int | None, pinned: bool = False, non_blocking: bool = False) -> None:
        self.index, self.pinned, self.non_blocking = index, pinned, non_blocking


@contextmanager
def placing(placement: Placement) -> Iterator[None]:
    """Tensors that are created in this context go there."""
    before = getattr(_local, "placement", None)
    _local.placement = placement
    try:
        yield
    finally:
        _local.placement = before


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments, also inside lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


class _PaperCuda(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if violations:
            raise PaperCudaError(violations.pop(0))
        operation = describe(func)
        if operation.composite:  # in inference mode, which skips the layer that decomposes it
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func.namespace != "aten":  # collectives: `collectives.py` handles them
            return func(*args, **kwargs)
        placement: Placement | None = getattr(_local, "placement", None)
        inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
        marks = [mark_of(tensor) for tensor in inputs]
        index = next((mark.index for mark in marks if isinstance(mark, Block) and mark.index is not None), None)
        if placement is None and operation.name == "copy_":
            return _copy(func, args, kwargs)
        if placement is not None and operation.name == "_to_copy":
            return _transfer(func, args, kwargs, placement)
        if index is not None and not operation.is_view:
            sync = sync_of(operation, args, kwargs)
            _check_devices(operation, args, inputs, marks, index)
            check_deterministic(operation, args, kwargs)
            if sync is not None:
                count_sync(sync)
                streams.current().synchronize()
        if not operation.is_view and any(isinstance(mark, Block) for mark in marks):
            _order(operation, args, kwargs, index)
        out = func(*args, **kwargs)
        _place(operation, out, inputs, marks, index, placement)
        return out


def _check_devices(
    operation: Operation, args: tuple[Any, ...], inputs: list[Tensor], marks: list[Block | Anywhere | None], index: int
) -> None:
    """Raise RuntimeError if tensors are on different devices and CUDA does not allow it. Memory without a fixed place moves to
    the device of the others."""
    written = args[0] if operation.writes and args else None
    free = {id(tensor) for tensor in args[1] if tensor is not None} if operation.indexes else ()
    for tensor, mark in zip(inputs, marks, strict=True):
        if isinstance(mark, Anywhere):
            if not (operation.indexes and tensor.dim() == 0):  # a number that is written to indices stays on the host
                allocate(tensor, index, operation.name)
        elif not (isinstance(mark, Block) and mark.index is not None):
            scalar = tensor.dim() == 0 and operation.takes_host_scalars and tensor is not written
            if not scalar and id(tensor) not in free and not tensor.is_meta:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:"
                    f"{index} and cpu! (in {operation.name}, a tensor {list(tensor.shape)} of {tensor.dtype} is on cpu)"
                )
        elif mark.index != index:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:"
                f"{index} and cuda:{mark.index}! (in {operation.name})"
            )


def _order(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None) -> None:
    """Record that the operation runs now, on the current stream or on the host."""
    stream = streams.host if index is None else streams.current()
    tick = stream.tick()
    for position, value in [*enumerate(args), *kwargs.items()]:
        for tensor in tensors_in((value,)):
            block = mark_of(tensor)
            if isinstance(block, Block) and (block.index is not None or index is None):
                writes = position in operation.writes
                block.use(tensor, stream, tick, writes=writes, operation=operation.name)


def _place(
    operation: Operation,
    out: Any,
    inputs: list[Tensor],
    marks: list[Block | Anywhere | None],
    index: int | None,
    placement: Placement | None,
) -> None:
    """Mark the memory that the operation allocated."""
    for tensor in tensors_in(out if isinstance(out, (list, tuple)) else (out,)):
        if mark_of(tensor) is not None or tensor.is_meta:
            continue
        where = placement.index if placement is not None else index
        if where is not None:
            if operation.is_view:  # of host memory, within a call that requests GPU memory: a copy follows
                continue
            block = allocate(tensor, where, operation.name)
            stream = streams.current()
            block.use(tensor, stream, stream.tick(), writes=True, operation=operation.name)
        elif placement is not None:
            if placement.pinned:
                allocate(tensor, None, operation.name)
        elif any(isinstance(mark, Anywhere) for mark in marks) or (not inputs and operation.name in _CREATIONS):
            set_mark(tensor, ANYWHERE)


def _transfer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], placement: Placement) -> Tensor:
    """`Tensor.to` with another device."""
    out: Tensor = func(*args, **kwargs)
    pinned = placement.pinned or (placement.index is None and placement.non_blocking)  # as torch does
    if placement.index is not None or pinned:
        allocate(out, placement.index, "to")
    _move(args[0], out, placement.non_blocking)
    return out


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`copy_`, the one operation that accepts tensors on any two devices."""
    target, source = args[:2]
    for one, other in ((target, source), (source, target)):
        mark, near = mark_of(one), mark_of(other)
        if isinstance(mark, Anywhere) and isinstance(near, Block) and near.index is not None:
            allocate(one, near.index, "copy_")
    _move(source, target, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    out: Tensor = func(*args, **kwargs)
    return out


def _move(source: Tensor, target: Tensor, non_blocking: bool) -> None:
    """A copy between any two kinds of memory; the host waits for it unless it is non-blocking and the host memory is pinned."""
    marks = mark_of(source), mark_of(target)
    blocks = [mark for mark in marks if isinstance(mark, Block)]
    on_gpu = [isinstance(mark, Block) and mark.index is not None for mark in marks]
    stream = streams.current() if any(on_gpu) else streams.host
    tick = stream.tick()
    for tensor, mark, writes in ((source, marks[0], False), (target, marks[1], True)):
        if isinstance(mark, Block):
            mark.use(tensor, stream, tick, writes=writes, operation="copy")
    if sum(on_gpu) == 1 and not (non_blocking and len(blocks) == 2):
        count_sync("copy to the host" if on_gpu[0] else "copy from the host")
        stream.synchronize()


_mode = _PaperCuda()


def install() -> None:
    """Watch this thread and every one that Python starts from now on."""
    _mode.__enter__()
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def watched(thread: threading.Thread) -> None:
        with _mode:
            begin(thread)

    threading.Thread._bootstrap_inner = watched  # type: ignore[attr-defined]


@contextmanager
def unwatched() -> Iterator[None]:
    """What runs in this context counts as one kernel: the caller says what it reads and writes."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield
