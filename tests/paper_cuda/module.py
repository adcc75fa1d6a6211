"""The functions of `torch.cuda`, for one GPU per local rank of the paper machine's kind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.paper_cuda import streams
from tests.paper_cuda.memory import ledger, mark_storage
from tests.paper_cuda.questions import gpu_index
from tests.paper_cuda.syncs import count_sync

GPUS = 8
TOTAL_BYTES = 80 * 2**30
CAPABILITY = (9, 0)


def _properties(device: Any = None) -> SimpleNamespace:
    index = streams.current_index() if device is None else gpu_index(device)
    return SimpleNamespace(
        name="Paper H100",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=TOTAL_BYTES,
        multi_processor_count=132,
        warp_size=32,
        uuid=f"paper-gpu-{index}",
    )


def _set_device(device: Any) -> None:
    index = gpu_index(device)
    assert index is not None
    streams.set_index(index)


def _exchange_device(index: int) -> int:
    before = streams.current_index()
    if index >= 0:
        streams.set_index(index)
    return before


def _synchronize(device: Any = None) -> None:
    count_sync("synchronize")
    streams.synchronize_device()


def _stream(stream: streams.Stream | None) -> Any:
    return contextlib.nullcontext() if stream is None else stream


def _statistics(device: Any = None) -> dict[str, int]:
    return {
        "allocated_bytes.all.current": ledger.live,
        "allocated_bytes.all.peak": ledger.peak,
        "reserved_bytes.all.current": ledger.live,
        "reserved_bytes.all.peak": ledger.peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def _nothing() -> Callable[..., None]:
    return lambda *args, **kwargs: None


def _share_cuda(storage: Any) -> tuple[Any, ...]:
    """What CUDA IPC returns for a storage, with shared memory in its place: (device, handle, size, offset, ...)."""
    manager, handle, size = storage._share_filename_cpu_()
    index = streams.current_index()
    return (index, manager + b"|" + handle, size, 0, b"", 0, b"", False)


def _new_shared_cuda(device: int, handle: bytes, size: int, offset: int, *_: Any) -> Any:
    storage = torch.UntypedStorage._new_shared_filename_cpu(*handle.split(b"|"), size)
    mark_storage(storage, device, "a CUDA IPC handle")
    return storage


def install() -> None:
    """Replace torch's functions with these."""
    cuda: Any = torch.cuda
    streams.set_index(int(os.environ.get("LOCAL_RANK", "0")))
    # The CPU's generator replaces each GPU's, so that a run makes the same draws as on the CPU.
    cuda.default_generators = (torch.default_generator,) * GPUS
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing(),
        "_lazy_init": _nothing(),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "device_count": lambda: GPUS,
        "current_device": streams.current_index,
        "set_device": _set_device,
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _exchange_device,
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: _properties(device).name,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "ipc_collect": _nothing(),
        "Stream": streams.Stream,
        "Event": streams.Event,
        "current_stream": lambda device=None: streams.current(),
        "default_stream": lambda device=None: streams.default,
        "stream": _stream,
        "set_stream": streams.set_current,
        "synchronize": _synchronize,
        "empty_cache": _nothing(),
        "memory_allocated": lambda device=None: ledger.live,
        "max_memory_allocated": lambda device=None: ledger.peak,
        "memory_reserved": lambda device=None: ledger.live,
        "max_memory_reserved": lambda device=None: ledger.peak,
        "mem_get_info": lambda device=None: (TOTAL_BYTES - ledger.live, TOTAL_BYTES),
        "memory_stats": _statistics,
        "reset_peak_memory_stats": lambda device=None: ledger.reset_peak(),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("_lazy_init", "_lazy_call", "current_device", "device_count", "is_initialized"):
        setattr(cuda.random, name, answers[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing())
    cuda.nccl.version = lambda: (2, 27, 0)
    storage: Any = torch.UntypedStorage
    storage._share_cuda_ = _share_cuda
    storage._new_shared_cuda = staticmethod(_new_shared_cuda)
