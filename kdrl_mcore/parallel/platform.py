"""Make Megatron-Core run on CPU over gloo; on CUDA this file changes only which attention kernels torch may choose.

Megatron-Core assumes one CUDA device per rank: it allocates with device="cuda" or `torch.cuda.current_device()`, moves scalars
with `.cuda()`, synchronises streams, keeps CUDA random states, and recognises dtypes by `Tensor.type()` strings. On a machine
without CUDA `prepare_platform` maps each of these onto its CPU counterpart, once per process and before Megatron-Core is
imported.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.groups import forget_groups
from kdrl_mcore.parallel.host_limits import num_cores
from kdrl_mcore.parallel.interfaces import set_gloo_interface

_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "zeros_like",
    "empty_like",
)
_prepared = False


def device() -> torch.device:
    """This rank's device: its CUDA device, or the CPU where there is no CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: Tensor) -> Tensor:
    """The tensor on this rank's device. On CUDA it is copied through pinned memory without making the host wait."""
    return tensor.pin_memory().to(device(), non_blocking=True) if torch.cuda.is_available() else tensor.to(device())


def prepare_platform(deterministic: bool = False) -> None:
    """Prepare this process for Megatron-Core. Idempotent; call it before importing anything from megatron.

    Args:
        deterministic: use torch's deterministic kernels, so that the same run gives the same bits.
    """
    global _prepared
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=False)
    if _prepared:
        return
    _prepared = True
    mcore.why_no_transformer_engine()
    # Megatron-Core warns at import about each optional CUDA package it does not find.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|apex|transformer_engine).*")
    # It calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated")
    # It uses torch's ShardedTensor when loading.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"Please use DTensor instead")
    # From 0.19 on it warns at every build that GPTModel gets no new features.
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        # NCCL's flight recorder then records which collectives have started and how long they took (resilience/watchdog.py).
        os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # On Hopper torch prefers cuDNN's attention, which builds a plan for every new length and never frees it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return
    _map_factories_to_cpu()
    _import_megatron_uncompiled()
    _map_cuda_module_to_cpu()
    _report_cuda_types()


def choose_threads() -> str | None:
    """Without a GPU, set the number of OpenMP threads of this rank: `OMP_NUM_THREADS`, which torchrun sets to 1 for several
    ranks, or else its share of the cores less one for other processes (verifiers, engines, checkpoint writers). All
    other threads spin while they wait for one that shares its core.

    Returns:
        A log line with the choice; None on CUDA.
    """
    if torch.cuda.is_available():
        return None
    ranks, cores, chosen = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), num_cores(), os.environ.get("OMP_NUM_THREADS")
    first = (chosen or "").split(",")[0].strip()  # further numbers are for nested regions, which torch does not have
    is_number = first.isdecimal() and int(first) > 0
    if not is_number:
        torch.set_num_threads(max(1, cores // ranks - 1))
    ignored = chosen is not None and not is_number
    how = f"OMP_NUM_THREADS={chosen!r} is no number and ignored" if ignored else "OMP_NUM_THREADS sets them"
    return f"{ranks} rank(s) on {cores} cores, OpenMP threads of each: {torch.get_num_threads()} ({how})"


def initialize_distributed(timeout_minutes: int) -> bool:
    """Join the world of torchrun's environment, or make a world of one rank without it. NCCL and gloo on CUDA, gloo on CPU.

    Returns:
        Whether this call created the world (and so must destroy it).
    """
    if torch.distributed.is_initialized():
        return False
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        set_gloo_interface()
        torch.distributed.init_process_group(backend, timeout=timeout)
    return True


def destroy_groups(kept: set[Any]) -> None:
    """Destroy a finished job's process groups (all but `kept`), which hold threads and sockets, in a world that continues.

    Collective over the world: a barrier, so that no group is closed while another rank still uses it.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    for group in set(torch.distributed.distributed_c10d._world.pg_map) - kept:
        torch.distributed.destroy_process_group(group)
    forget_groups()
    gc.collect()  # models refer to their groups in cycles


def _is_cuda(where: Any) -> bool:
    return (isinstance(where, str) and where.startswith("cuda")) or (isinstance(where, torch.device) and where.type == "cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The factory function with `device="cuda"` replaced by the CPU."""

    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return factory


def _map_factories_to_cpu() -> None:
    # `with torch.device(...)` recognises factory functions by identity from a list that it makes once. Make it now, so that it
    # holds the original ones.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    original_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original_to(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class _NoStream:
    """Stands in for a CUDA stream or event: the CPU runs in order, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _NoStream:
        """The event that other streams would wait for."""
        return _NoStream()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _import_megatron_uncompiled() -> None:
    """Import Megatron-Core with `torch.compile` disabled. It compiles its fused functions, which are used only on CUDA
    (model/gpt.py), on import, and importing torch's compiler takes longer than importing Megatron-Core itself."""
    compile_, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_


def _do_nothing() -> Callable[..., None]:
    """A new no-op each time, because torch's compiler needs the functions of torch.cuda to be distinct objects."""
    return lambda *args, **kwargs: None


def _map_cuda_module_to_cpu() -> None:
    cpu = torch.device("cpu")
    replacements: dict[str, Any] = {
        "current_device": lambda: cpu,
        "set_device": _do_nothing(),
        "synchronize": _do_nothing(),
        "empty_cache": _do_nothing(),
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    from megatron.core.tensor_parallel import random as megatron_random

    setattr(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())  # noqa: B010
    setattr(megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))  # noqa: B010


def _report_cuda_types() -> None:
    """Make `Tensor.type()` return torch.cuda.*: the distributed optimizer recognises its parameters by these strings."""
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
