"""Make Megatron-Core run on CPU over gloo; on CUDA this file changes nothing but which attention kernels torch chooses from.

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
    """The tensor on this rank's device. On CUDA it goes through pinned memory, and nothing waits for it."""
    return tensor.pin_memory().to(device(), non_blocking=True) if torch.cuda.is_available() else tensor.to(device())


def prepare_platform(deterministic: bool = False) -> None:
    """Prepare this process for Megatron-Core. Idempotent; call it before importing anything from megatron.

    Args:
        deterministic: ask torch for deterministic kernels, so that the same run gives the same bits.
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
    # From 0.19 on it says at every build that GPTModel gets no new features.
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        # NCCL's flight recorder then knows which collectives have started, and how long they took (monitoring/watchdog.py).
        os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # On Hopper torch prefers cuDNN's attention, which builds a plan for every new length and keeps it for ever.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return
    _map_factories_to_cpu()
    _map_cuda_module_to_cpu()
    _report_cuda_types()


def initialize_distributed(timeout_minutes: int) -> bool:
    """Join the job's world (torchrun's environment; alone without it). NCCL on CUDA with gloo beside it, gloo on CPU.

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
    """End a job in a world that lives on: destroy its process groups (all but `kept`), each of which holds threads and sockets.

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
    """The factory function with `device="cuda"` read as the CPU."""

    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return factory


def _map_factories_to_cpu() -> None:
    # `with torch.device(...)` recognises factory functions by identity, from a list it makes once: it must hold the original
    # ones.
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
    """Stands for a CUDA stream or event: the CPU runs in order, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _NoStream:
        """The point in the stream that others would wait for."""
        return _NoStream()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _do_nothing() -> Callable[..., None]:
    """A new no-op each time: torch's compiler wants the functions of torch.cuda to be distinct objects."""
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
    """`Tensor.type()` says torch.cuda.*: the distributed optimizer recognises its parameters by these strings."""
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
