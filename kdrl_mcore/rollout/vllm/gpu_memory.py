"""GPU memory that training shares with engines: memory for CUDA IPC, and memory that the allocator returns to the GPU.

Training prefers segments that grow (`expandable_segments`, slurm/task.sh). Neither CUDA IPC nor vLLM's custom all-reduce can
open the memory of such a segment by its handle.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with the settings of torch's allocator: `option:value,option:value`."""
_OPTION = "expandable_segments"
ENGINE_SHARE = 0.85
"""Share of each GPU for an engine if none is configured: exactly this on a server, at most this if the GPU also trains."""
RESERVE = 0.05
"""Share of a GPU left free for the allocators' fragmentation."""


def without_expandable_segments(settings: str) -> str:
    """Settings of torch's allocator without this option."""
    return ",".join(option for option in settings.split(",") if option.partition(":")[0].strip() not in ("", _OPTION))


@contextmanager
def plain_segments() -> Iterator[None]:
    """Inside this context memory is allocated in segments that do not grow; with the option off, torch's allocator does not
    reuse blocks of growing segments either. All settings are set together, because those not named return to their defaults."""
    settings = _get_settings()
    if _OPTION not in settings:
        yield
        return
    others = without_expandable_segments(settings)
    _set_settings(",".join(filter(None, (others, f"{_OPTION}:False"))))
    try:
        yield
    finally:
        _set_settings(settings)


def give_back() -> None:
    """Return all unused memory of this process to the GPU, for other processes."""
    if torch.cuda.is_available():
        gc.collect()  # buffers held only by reference cycles
        torch.cuda.ipc_collect()  # slots of a refit that their readers have released
        torch.cuda.empty_cache()


def free_share() -> float:
    """The free share of this rank's GPU that an engine on the same GPU may use."""
    free, total = torch.cuda.mem_get_info()
    return min(ENGINE_SHARE, math.floor(100 * (free / total - RESERVE)) / 100)


def _get_settings() -> str:
    get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if get is not None:
        return str(get())
    return next((os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)), "")


def _set_settings(settings: str) -> None:
    set_ = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    set_(settings)
