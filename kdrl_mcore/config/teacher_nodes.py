"""What a SLURM job starts on `cluster.teacher_nodes`: the servers of the teachers that have no `server.urls`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdrl_mcore.config.derived import section_of, served_teachers, teacher_prompt_tokens
from kdrl_mcore.config.schema import Config
from kdrl_mcore.errors import ConfigError


@dataclass(frozen=True)
class TeacherNodes:
    """The servers of one teacher.

    Attributes:
        name: the teacher's name.
        nodes: how many nodes serve it.
        per_node: the servers on each of them.
        gpus: the GPUs of each server; 0 without GPUs.
        arguments: those of `kdrl-serve-teacher`, without where it runs.
    """

    name: str
    nodes: int
    per_node: int
    gpus: int
    arguments: tuple[str, ...]


def teacher_nodes(config: Config, gpus: int) -> list[TeacherNodes]:
    """The servers of each teacher, which share the nodes evenly; empty without `cluster.teacher_nodes`.

    Args:
        gpus: the number of GPUs of a node.

    Raises:
        ConfigError: a teacher has no folder, or no server of it fits a node.
    """
    served = {name: each for name, each in served_teachers(config).items() if not each.server.urls}
    if not config.cluster.teacher_nodes:
        return []
    found = []
    for name, teacher in served.items():
        section, tensor = section_of(config, name), teacher.parallel.tensor
        if not teacher.path:
            raise ConfigError(f"cluster.teacher_nodes serves the model in {section}.path, which is not set: name its folder")
        if gpus and tensor > config.cluster.gpus_per_node:
            raise ConfigError(
                f"{section}.parallel.tensor={tensor} does not fit a node of {config.cluster.gpus_per_node} GPUs: change it"
            )
        path = Path(teacher.path)
        values = {
            "model": path.absolute() if path.exists() else path,  # else a hub id
            "kind": teacher.server.kind,
            "name": name,
            "dtype": config.model.dtype,
            "max-model-len": teacher_prompt_tokens(config, name) + config.rollout.max_response_tokens + 1,
            "tensor": tensor,
        }
        values |= {"max-logprobs": config.objective.kd.top_k} if teacher.server.kind == "completions" else {}
        words = tuple(word for key, value in values.items() for word in (f"--{key}", str(value)))
        per_node = config.cluster.gpus_per_node // tensor if gpus else 1
        found.append(TeacherNodes(name, config.cluster.teacher_nodes // len(served), per_node, tensor if gpus else 0, words))
    return found
