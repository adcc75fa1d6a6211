"""GPU memory that runs out, told in one line: where, what was alive, and which key to lower."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.errors import GpuMemoryError
from kdrl_mcore.parallel.host_state import state_tensors
from kdrl_mcore.parallel.platform import device

GIB = 2**30
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""In the messages of what allocates beside torch's allocator: NCCL, cuBLAS, cuDNN, the driver."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of this rank's GPU.

    Attributes:
        allocated: of living tensors of this process.
        cached: of torch's allocator beside them.
        free: of the GPU.
        total: of the GPU.
    """

    allocated: int
    cached: int
    free: int
    total: int


def ran_out(error: BaseException) -> bool:
    """Whether this error says that GPU memory ran out, in torch's allocator or beside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS) and re.search("CU|NCCL", text) is not None


def out_of_memory(error: BaseException, where: str, rank: int, alive: Mapping[str, int], advice: str) -> GpuMemoryError:
    """The one line. To be called while the error is handled: what its frames hold is then still alive.

    Args:
        where: step and phase.
        alive: bytes on the GPU by kind; what is allocated beyond them is told as activations.
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
            f"outside of it {_gib(max(0, memory.total - memory.free - memory.allocated - memory.cached))}",
        ]
    gpu = "" if memory is None else f", GPU {os.environ.get('LOCAL_RANK', '0')} of {_gib(memory.total)}"
    return GpuMemoryError(
        f"GPU memory ran out in {where}, on rank {rank} ({socket.gethostname()}{gpu})"
        f"{f', where {asked[1]} more were needed' if asked else ''}; alive were: "
        f"{', '.join(parts) or 'nothing of a model yet'}; {advice}"
    )


def alive_by_kind(student: Any, others: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the models on this rank's GPU: the student's weights, gradients and optimizer state, and the weights of others.

    Args:
        student: a `Student`, or None before there is one.
        others: models that only score, by name; each may be None.
    """
    alive: dict[str, int] = {}
    if student is not None:
        buffers = [buffer for chunk in student.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        alive["weights"] = _bytes_on_gpu(student.parts.parameters())
        alive["gradients"] = _bytes_on_gpu(buffer.grad_data for buffer in buffers)
        weights = {_place(parameter) for parameter in student.parts.parameters()}
        alive["optimizer"] = _bytes_on_gpu(
            tensor for tensor in state_tensors(student.optimizer) if _place(tensor) not in weights
        )
    for name, model in others.items():
        if model is not None:
            alive[f"{name}'s weights"] = _bytes_on_gpu(model.parts.parameters())
    return alive


def key_to_lower(config: Config, phase: str) -> str:
    """What to change where memory ran out in this phase, by what the configuration has not done yet."""
    rollout, parallel = config.rollout, config.parallel
    spread = "spread the student over more GPUs (parallel.tensor, parallel.pipeline)"
    colocated = rollout.engine == "vllm" and rollout.vllm.placement == "colocated"
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
            *(["parallel.recompute=full"] if parallel.recompute == "none" else []),
            *(["optimizer.offload=true"] if not config.optimizer.offload else []),
            *(["teacher.offload=true"] if config.teacher.path and not config.teacher.offload else []),
        ]
        return f"{micro}{f', or set {unused[0]}' if unused else ''}, or {spread}"
    if phase in ("checkpoint", "resume", "export") and colocated:
        return f"{engine}, or {spread}"
    return spread


def _gpu_memory() -> GpuMemory | None:
    """None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    return GpuMemory(allocated, torch.cuda.memory_reserved() - allocated, free, total)


def _bytes_on_gpu(tensors: Iterable[Tensor]) -> int:
    """Of the memory these tensors lie in, each piece once."""
    storages = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device == device()}
    return sum(storages.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
