"""The memory that ranks without GPUs need at least: if a machine has less, Linux silently kills a process."""

from __future__ import annotations

import math
import os
import socket

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import loaded_teachers, uses_distributed_optimizer, uses_reference
from kdrl_mcore.convert.weight_map import global_tensors
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.parallel.host_limits import free_memory
from kdrl_mcore.parallel.layout import Layout, student_layout, teacher_layout

GIB = 2**30


def num_parameters(architecture: Architecture) -> int:
    """The number of the model's parameters, without padding."""
    rules = FAMILIES[architecture.family].rules(architecture)
    return sum(math.prod(tensor.shape) for tensor in global_tensors(rules, architecture) if not tensor.keeps_dtype)


def least_bytes(config: Config, world_size: int) -> float:
    """A lower bound of the bytes that all ranks hold together: the weights of every model, and the student's gradients and
    optimizer state. Activations, logits, KV caches and the processes themselves come in addition.

    Raises:
        ConfigError: a layout does not fit the number of ranks.
    """
    item = torch.empty((), dtype=getattr(torch, config.model.dtype)).element_size()
    copies = _copies(student_layout(world_size, config.parallel))
    parameters = num_parameters(read_architecture(str(config.student.path)))
    held = copies * parameters * item
    if not config.student.lora.rank:
        state = {"adam": 8, "sgd": 0}[config.optimizer.name] + (4 if item == 2 else 0)
        held += copies * parameters * 4 + (1 if uses_distributed_optimizer(config) else copies) * parameters * state
    if uses_reference(config.objective):
        held += copies * parameters * item
    for teacher in loaded_teachers(config).values():
        size = num_parameters(read_architecture(str(teacher.path)))
        held += _copies(teacher_layout(world_size, teacher.parallel)) * size * item
    return held


def too_little_memory(config: Config, engines: float = 0.0) -> str | None:
    """What is wrong if this machine, without GPUs, has less free memory than its ranks will need at least; None if it may do.

    Args:
        engines: the GiB that the engines of this machine need.
    """
    world_size, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = least_bytes(config, world_size) * min(here, world_size) / world_size / GIB + engines, free_memory() / GIB
    if needed <= free:
        return None
    kinds = "weights, gradients and optimizer state" + (", and vLLM's engines" if engines else "")
    return (
        f"{socket.gethostname()} has {free:.1f} GiB of free memory, and its {here} rank(s) need more than {needed:.1f} GiB "
        f"({kinds}): use a larger machine, smaller models, adapters (student.lora.rank), or fewer replicas (parallel.tensor, "
        "parallel.pipeline)"
    )


def _copies(layout: Layout) -> int:
    """How often the ranks hold each weight; 1 where experts are distributed, which is less than the truth."""
    return 1 if layout.expert > 1 else layout.data * layout.context
