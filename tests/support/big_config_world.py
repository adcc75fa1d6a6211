"""Ranks of a world of hundreds, built one after the other in one process on the meta device: nothing is allocated.

It runs as a program, because a process can be in only one world. Each experiment is a process forked with everything imported.
It prints a line of JSON: what each rank of one student replica, and each rank of one teacher replica, holds; null if the
experiment cannot be built:

    python -m tests.support.big_config_world '["key=value", ...]' ...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.parallel.platform import prepare_platform

prepare_platform()

from kdrl_mcore.convert.parameters import map_chunk  # noqa: E402
from kdrl_mcore.model import gpt  # noqa: E402
from kdrl_mcore.model.families import FAMILIES  # noqa: E402
from kdrl_mcore.planning.world import fake_process_groups, fake_world  # noqa: E402
from kdrl_mcore.student import student as student_module  # noqa: E402
from kdrl_mcore.teacher import teacher as teacher_module  # noqa: E402

META = torch.device("meta")


def describe(config: Config) -> list[dict[str, Any]]:
    """What the ranks of one student replica and of one teacher replica hold of the student, the optimizer and the teacher."""
    world_size = config.cluster.nodes * config.cluster.gpus_per_node
    parallel, teacher = config.parallel, config.teacher.parallel
    # Both enumerate ranks with the pipeline stage slowest and the tensor rank fastest.
    student_ranks = _first_replica(world_size, parallel.tensor * parallel.context, parallel.pipeline)
    teacher_ranks = _first_replica(world_size, teacher.tensor, teacher.pipeline)
    return [_as_rank(config, rank, world_size) for rank in sorted(student_ranks | teacher_ranks | {world_size - 1})]


def _first_replica(world_size: int, ranks_per_stage: int, stages: int) -> set[int]:
    return {stage * world_size // stages + rank for stage in range(stages) for rank in range(ranks_per_stage)}


def _as_rank(config: Config, rank: int, world_size: int) -> dict[str, Any]:
    with fake_world(rank, world_size), counted_groups() as groups:
        assert config.student.path and config.teacher.path
        student = student_module.Student(config, world_size, vocab_size=1000)
        teacher = teacher_module.Teacher(config.teacher.path, config.teacher, config.model, world_size, vocab_size=1000)
        return {
            "rank": rank,
            "new_groups": len(groups),
            "student": _holds(student.parts),
            "teacher": _holds(teacher.parts),
            "optimized": sum(
                parameter.numel() for group in student.optimizer.megatron.param_groups for parameter in group["params"]
            ),
        }


@contextmanager
def counted_groups() -> Iterator[list[Any]]:
    """Record every call that makes a process group, whether or not this rank is in it."""
    calls: list[Any] = []
    new_group = dist.new_group

    def counting(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        calls.append(ranks)
        return new_group(ranks, *args, **kwargs)

    with patch.object(dist, "new_group", counting):
        yield calls


def _holds(parts: gpt.ModelParts) -> dict[str, Any]:
    """The replica, the number of parameters, and the HF slices (tensor, dimension, start, length) that this rank holds."""
    rules = FAMILIES[parts.architecture.family].rules(parts.architecture)
    return {
        "replica": parts.groups.data.rank(),
        "parameters": sum(parameter.numel() for parameter in parts.parameters()),
        "slices": [
            (each.hf, each.dim, each.hf_start, each.length)
            for chunk in parts.chunks
            for mapped in map_chunk(chunk, rules, parts.groups)
            for each in mapped.slices
        ],
    }


def fake_the_machine() -> None:
    """Put every tensor on the meta device; make no gloo groups and load no weights."""
    torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
    gpt.device = lambda: META
    fake_process_groups()
    type_of = torch.Tensor.type
    # The distributed optimizer recognises the tensors of a GPU by the name of their type.
    torch.Tensor.type = lambda self, *args: type_of(self, *args) if args else type_of(self).replace("meta.", "")  # type: ignore[method-assign]
    for module in (student_module, teacher_module):
        module.load_weights = lambda *args: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    fake_the_machine()
    for experiment in sys.argv[1:]:
        if os.fork() == 0:
            print(json.dumps(describe(load_config(json.loads(experiment)))), flush=True)
            os._exit(0)
        if os.wait()[1]:
            print("null", flush=True)
