"""A one-line error when GPU memory runs out: where, what was allocated, and which key to lower."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import engines_share_gpus
from kdrl_mcore.errors import GpuMemoryError
from kdrl_mcore.parallel.host_state import state_tensors
from kdrl_mcore.parallel.platform import device

GIB = 2**30
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Parts of the error messages of allocations outside torch's allocator: NCCL, cuBLAS, cuDNN, the driver."""


@dataclass(frozen=True)
class GpuMemory:
    """Memory of this rank's GPU in bytes.

    Attributes:
        allocated: held by this process's tensors.
        cached: held by torch's allocator in addition.
        free: free on the GPU.
        total: the size of the GPU's memory.
    """

    allocated: int
    cached: int
    free: int
    total: int


def ran_out(error: BaseException) -> bool:
    """Whether an error means that GPU memory ran out, in torch's allocator or outside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS) and re.search("CU|NCCL", text) is not None


def out_of_memory(error: BaseException, where: str, rank: int, alive: Mapping[str, int], advice: str) -> GpuMemoryError:
    """The one-line error. Call it while handling the original error, whose frames then still hold their tensors.

    Args:
        where: step and phase.
        alive: bytes on the GPU by kind; other allocations count as activations.
        advice: which key to lower.
    """
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?[KMGT]iB)", str(error))
    kinds = sorted(alive.items(), key=lambda item: -item[1])
    memory = _gpu_memory()
    parts = [f"{kind} {_gib(size)}" for kind, size in kinds if size]
    if memory is not None:
        known = sum(alive.values())
        parts += [
            f"activations and all else {_gib(max(0, memory.allocated - known))}",
            f"cached by torch {_gib(memory.cached)}",
            f"outside torch {_gib(max(0, memory.total - memory.free - memory.allocated - memory.cached))}",
        ]
    gpu = "" if memory is None else f", GPU {os.environ.get('LOCAL_RANK', '0')} of {_gib(memory.total)}"
    return GpuMemoryError(
        f"GPU memory ran out in {where}, on rank {rank} ({socket.gethostname()}{gpu})"
        f"{f', where {asked[1]} more were needed' if asked else ''}; allocated were: "
        f"{', '.join(parts) or 'no parts of a model yet'}; {advice}"
    )


@contextmanager
def gpu_memory_errors(where: str, rank: int, advice: str) -> Iterator[None]:
    """Raise GpuMemoryError in place of any error which means that GPU memory ran out in this context; see `out_of_memory`."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise out_of_memory(error, where, rank, {}, advice) from None


def alive_by_kind(student: Any, others: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on this rank's GPU by kind: the student's weights, gradients and optimizer state, and other models' weights.

    Args:
        student: a `Student`, or None before there is one.
        others: models that only score, by name; each may be None, or the student itself.
    """
    alive: dict[str, int] = {}
    own: set[int] = set()
    if student is not None:
        buffers = [buffer for chunk in student.optimizer.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        alive["weights"] = _bytes_on_gpu(student.parts.parameters())
        alive["gradients"] = _bytes_on_gpu(buffer.grad_data for buffer in buffers)
        own = {_storage(parameter) for parameter in student.parts.parameters()}
        alive["optimizer"] = _bytes_on_gpu(
            tensor for tensor in state_tensors(student.optimizer.megatron) if _storage(tensor) not in own
        )
    for name, model in others.items():
        if model is not None:
            alive[f"{name}'s weights"] = _bytes_on_gpu(
                parameter for chunk in model.chunks for parameter in chunk.parameters() if _storage(parameter) not in own
            )
    return alive


def key_to_lower(config: Config, phase: str) -> str:
    """What to change if memory ran out in this phase: a key that the configuration does not use yet."""
    rollout, parallel = config.rollout, config.parallel
    spread = "spread the student over more GPUs (parallel.tensor, parallel.pipeline)"
    colocated = engines_share_gpus(rollout)
    share = rollout.vllm.gpu_memory_utilization
    engine = f"lower rollout.vllm.gpu_memory_utilization (now {'what the plan leaves' if share is None else f'{share:g}'})"
    micro = f"lower batch.micro_tokens (now {config.batch.micro_tokens})"
    if phase in ("rollout", "evaluation") and rollout.engine == "megatron":
        return f"lower rollout.max_sequences (now {rollout.max_sequences})"
    if phase in ("rollout", "evaluation", "refit", "start engines") and colocated:
        return engine
    if phase.startswith("load ") and phase.removeprefix("load ") in ("teacher", "reference"):
        return "spread the teacher over more GPUs (teacher.parallel.tensor, teacher.parallel.pipeline)"
    if phase in ("teacher", "self-test"):
        return f"{micro} or spread the teacher over more GPUs (teacher.parallel.tensor)"
    if phase == "train":
        unused = [
            *(["parallel.recompute=full"] if parallel.recompute != "full" and not parallel.offload_activations else []),
            *(["optimizer.offload=true"] if not config.optimizer.offload else []),
            *(["teacher.offload=true"] if config.teacher.path and not config.teacher.offload else []),
            *(f"teachers.{name}.offload=true" for name, teacher in config.teachers.items() if not teacher.offload),
        ]
        return f"{micro}{f', or set {unused[0]}' if unused else ''}, or {spread}"
    if phase in ("checkpoint", "resume", "export") and colocated:
        return f"{engine}, or {spread}"
    return spread


def _gpu_memory() -> GpuMemory | None:
    """The memory of this rank's GPU; None if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    return GpuMemory(allocated, torch.cuda.memory_reserved() - allocated, free, total)


def _bytes_on_gpu(tensors: Iterable[Tensor]) -> int:
    """The bytes of these tensors' storages on the GPU, each counted once."""
    storages = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device == device()}
    return sum(storages.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
