"""gloo in place of NCCL: a group accepts what its requested backends accept, and works on a separate stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.paper_cuda import streams
from tests.paper_cuda.dispatch import tensors_in, unwatched
from tests.paper_cuda.memory import Block, index_of, mark_of

_PLAYED = "cpu:gloo,cuda:gloo"
_METHODS = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "allgather_coalesced"),
    *("allgather_into_tensor_coalesced", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base"),
    *("reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "send", "recv", "recv_anysource"),
    # Their names from torch 2.13 on.
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    "all_to_all_single",
)
_NOT_NCCL = (torch.int16, torch.complex32)
_asked: dict[str, str] = {}  # the backend that was requested for each group, by the group's name
_streams: dict[str, streams.Stream] = {}


class _Work:
    """A collective in progress on a group's stream; a stream that waits for it can use its results."""

    def __init__(self, work: Any, done: streams.Event, tensors: list[Tensor]) -> None:
        self._work, self._done, self._tensors = work, done, tensors

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        """The current stream waits."""
        with unwatched():
            result: bool = self._work.wait(*args, **kwargs)
        streams.current().wait_event(self._done)
        self._tensors = []
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _all_tensors(values: tuple[Any, ...]) -> list[Tensor]:
    found = list(tensors_in(values))
    for value in values:
        if isinstance(value, (list, tuple)):
            found += [tensor for item in value if isinstance(item, (list, tuple)) for tensor in tensors_in((item,))]
    return found


def check_nccl(tensors: list[Tensor], what: str) -> None:
    """Raise RuntimeError, as NCCL would, for tensors that it does not accept."""
    for tensor in tensors:
        if index_of(tensor) is None:
            raise RuntimeError(f"{what}: No backend type associated with device type cpu (a tensor {list(tensor.shape)})")
        if tensor.dtype in _NOT_NCCL:
            raise RuntimeError(f"{what}: Unconvertible NCCL type {tensor.dtype}")
        if not torch._prims_common.is_non_overlapping_and_dense_or_false(tensor):
            raise RuntimeError(f"{what}: Tensors must be non-overlapping and dense")


def launch(stream: streams.Stream, tensors: list[Tensor], what: str) -> streams.Event:
    """Run a collective on a group's stream, after the work that the current stream has so far."""
    stream.wait_stream(streams.current())
    tick = stream.tick()
    for tensor in tensors:
        block = mark_of(tensor)
        if isinstance(block, Block):
            block.use(tensor, stream, tick, writes=True, operation=what)
            block.record_stream(stream)  # torch keeps what a collective uses
    return stream.record_event()


def _played(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def collective(group: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = _all_tensors((*args, *kwargs.values()))
        asked = _asked.get(group.group_name, "gloo")
        on_gpu = [index_of(tensor) is not None for tensor in tensors]
        if "nccl" in asked and (any(on_gpu) or asked == "nccl"):
            check_nccl(tensors, name)
        if not any(on_gpu):
            return method(group, *args, **kwargs)
        stream = _streams.setdefault(group.group_name, streams.Stream())
        done = launch(stream, tensors, name)
        with unwatched():  # gloo copies from and to its internal buffers
            work = method(group, *args, **kwargs)
        return _Work(work, done, tensors)

    return collective


class PaperNCCL:
    """Stands in for `torch.distributed.ProcessGroupNCCL`, a separate NCCL group."""

    class Options:
        """Stands in for the group's options."""

        _timeout: Any = None
        is_high_priority_stream = False

    def __init__(self, store: Any, rank: int, size: int, options: Any = None) -> None:
        gloo: Any = dist.ProcessGroupGloo
        settings = gloo._Options()
        settings._devices = [gloo.create_device(hostname="127.0.0.1")]
        if options is not None and options._timeout is not None:
            settings._timeout = options._timeout
        self._group = gloo(store, rank, size, settings)
        self._stream = streams.Stream()

    def broadcast(self, tensors: list[Tensor], options: Any) -> _Work:
        """Broadcast GPU tensors; others are refused."""
        check_nccl(tensors, "broadcast")
        done = launch(self._stream, tensors, "broadcast")
        with unwatched():
            work = self._group.broadcast(tensors, options)
        return _Work(work, done, tensors)

    def abort(self) -> None:
        """End the group."""
        self._group.abort()


def install() -> None:
    """Replace NCCL."""
    init, new_group = dist.init_process_group, dist.new_group
    c10d = dist.distributed_c10d

    def register(group: Any, backend: str) -> None:
        _asked[group.group_name] = backend
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        backend = backend or "cpu:gloo,cuda:nccl"
        kwargs.pop("device_id", None)
        init(_PLAYED if "nccl" in backend else backend, *args, **kwargs)
        register(dist.group.WORLD, backend)

    def make_group(
        ranks: Any = None, timeout: Any = None, backend: str | None = None, pg_options: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        asked = backend or _asked[dist.group.WORLD.group_name]
        kwargs.pop("device_id", None)
        played = _PLAYED if "nccl" in asked else backend
        group = new_group(ranks, timeout, played, None if "nccl" in asked else pg_options, *args, **kwargs)
        if isinstance(group, dist.ProcessGroup):
            register(group, asked)
        return group

    object_device = c10d._get_object_coll_device

    def device_of_objects(group: Any = None) -> str:
        asked = _asked.get((group or dist.group.WORLD).group_name, "gloo")
        return "cuda" if asked == "nccl" else object_device(group)

    for module in (dist, c10d):
        module.init_process_group = init_process_group
        module.new_group = make_group
        module.ProcessGroupNCCL = PaperNCCL
        module.is_nccl_available = lambda: True
    c10d._get_object_coll_device = device_of_objects
    for name in _METHODS:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _played(name, getattr(dist.ProcessGroup, name)))
