"""GPU memory that training shares with engines: what CUDA IPC can share, and what the allocator gives back to the others.

Training likes segments that grow (`expandable_segments`, slurm/task.sh). Neither CUDA IPC nor vLLM's custom all-reduce can
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
"""Share of each GPU for an engine where none is set: of a server's GPU; of one that also trains at most."""
RESERVE = 0.05
"""Share of a GPU that nobody plans with: the allocators' fragmentation."""


def without_expandable_segments(settings: str) -> str:
    """Settings of torch's allocator without this option; the others stay."""
    return ",".join(option for option in settings.split(",") if option.partition(":")[0].strip() not in ("", _OPTION))


@contextmanager
def plain_segments() -> Iterator[None]:
    """What is allocated in here lies in segments that do not grow: once the option is off, torch's allocator hands out no block
    of a growing one either. The settings are set as a whole: an option that is not named goes back to its default."""
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
    """Give all memory that this process does not use back to the GPU, where other processes may take it."""
    if torch.cuda.is_available():
        gc.collect()  # buffers that are only reached by cycles
        torch.cuda.ipc_collect()  # slots of a refit that their readers have let go of
        torch.cuda.empty_cache()


def free_share() -> float:
    """What is free of this rank's GPU, as the share of an engine beside it."""
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
