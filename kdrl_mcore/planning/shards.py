"""What the ranks of a layout hold, from the real model: built in a faked world by `world.py`, in a process of its own.

A process can be in only one world, and this one may be in a real one already. Answers are kept, so that a layout is built
once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kdrl_mcore.errors import ConfigError, KdrlError

SHAPES = Path(__file__).parent / "shapes"
"""The `config.json` of published models, for planning where the model itself is not at hand."""


@dataclass(frozen=True)
class ShardRequest:
    """One model in one layout.

    Attributes:
        path: a directory with an HF `config.json`.
        trainable: False is a model that only scores.
    """

    path: str
    dtype: str
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    trainable: bool = True


@dataclass(frozen=True)
class Stage:
    """A pipeline stage on one of its tensor-parallel ranks (they are alike); all numbers are elements of this rank.

    Attributes:
        layers: transformer layers.
        parameters: of all kinds.
        experts: those of them in experts, which are replicated over fewer ranks.
        layer_matrices: weights a token is multiplied with in one layer: all matrices, but of the experts only those that work
            on it.
        embedding, head: input embedding and output head; a tied one counts where it is used.
    """

    layers: int
    parameters: int
    experts: int
    layer_matrices: int
    embedding: int
    head: int


@dataclass(frozen=True)
class LayerMemory:
    """One layer's bytes per token of the micro-batch's part on this rank, traced through the real layer.

    Attributes:
        input: what comes in: all that is kept of a layer that is recomputed.
        saved: what is kept for the backward pass, the input included.
        forward: the most that is alive during a forward pass that keeps nothing, the input included.
        backward: the most that is alive during forward and backward, the input included.
    """

    input: float
    saved: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Shard:
    """A model in a layout.

    Attributes:
        stages: in pipeline order.
        layer: of activations.
        kv_bytes: keys and values of one token in one layer on one rank.
        columns: of the output head on one rank.
    """

    stages: tuple[Stage, ...]
    layer: LayerMemory
    kv_bytes: int
    columns: int


_known: dict[ShardRequest, Shard | str] = {}


def find_shape(path: str | None, key: str) -> str:
    """The directory that describes a model: the one named, or the published shape of that name.

    Raises:
        ConfigError: there is neither.
    """
    if not path:
        raise ConfigError(f"{key} is not set: name a model directory, or one of: {', '.join(shape_names())}")
    if (Path(path) / "config.json").is_file():
        return path
    if (SHAPES / Path(path).name / "config.json").is_file():
        return str(SHAPES / Path(path).name)
    raise ConfigError(f"{key}={path} has no config.json; put one there, or name one of: {', '.join(shape_names())}")


def shape_names() -> list[str]:
    """The published models that can be planned by name."""
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def try_shards(requests: Sequence[ShardRequest]) -> list[Shard | str]:
    """Each model in its layout, or why it does not fit that layout.

    Raises:
        KdrlError: the faked world broke down.
    """
    new = [request for request in dict.fromkeys(requests) if request not in _known]
    if new:
        done = subprocess.run(
            [sys.executable, "-m", "kdrl_mcore.planning.world"],
            input=json.dumps([asdict(request) for request in new]),
            capture_output=True,
            text=True,
            # The plan is the same whether or not there is a GPU, and nothing here may take one's memory.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "1", "RANK": "0", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )
        if done.returncode:
            raise KdrlError(f"the model could not be built in a faked world: {done.stderr.strip().splitlines()[-1:]}")
        for request, answer in zip(new, json.loads(done.stdout.splitlines()[-1]), strict=True):
            _known[request] = answer if isinstance(answer, str) else _shard(answer)
    return [_known[request] for request in requests]


def get_shards(requests: Sequence[ShardRequest]) -> list[Shard]:
    """Each model in its layout.

    Raises:
        ConfigError: a model does not fit its layout.
    """
    result = []
    for answer in try_shards(requests):
        if isinstance(answer, str):
            raise ConfigError(answer)
        result.append(answer)
    return result


def _shard(answer: dict) -> Shard:
    return Shard(
        tuple(Stage(**stage) for stage in answer["stages"]),
        LayerMemory(**answer["layer"]),
        answer["kv_bytes"],
        answer["columns"],
    )
