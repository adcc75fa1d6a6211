"""The shards that the ranks of a layout hold, taken from the real model, which `world.py` builds in a fake world in a separate
process.

A process can be in only one world, and this one may already be in a real one. Results are kept, so that each layout is built
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

from kdrl_mcore.config import LoraConfig, without_revision
from kdrl_mcore.errors import ConfigError, KdrlError

SHAPES = Path(__file__).parent / "shapes"
"""The `config.json` of published models, for planning without the model itself."""


@dataclass(frozen=True)
class ShardRequest:
    """One model in one layout.

    Attributes:
        path: a directory with an HF `config.json`.
        trainable: False for a model that only scores.
        recomputed, offloaded: names as in `parallel.recompute_modules` (under selective recompute) and
            `parallel.offload_activations`.
        lora_rank, lora_modules, lora_parameters: the adapters that are trained in place of the weights; rank 0 is none.
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
    recomputed: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_modules: tuple[str, ...] = ()
    lora_parameters: tuple[str, ...] = ()

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters as `student.lora` describes them."""
        return lora_config(self.lora_rank, self.lora_modules, self.lora_parameters)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage on one of its tensor-parallel ranks (all have equal shards). Except for `layers`, all numbers are
    elements on this rank.

    Attributes:
        layers: the number of transformer layers.
        parameters: parameters of all kinds.
        experts: the parameters among them that belong to experts, which are replicated over fewer ranks.
        layer_matrices: the weights in one layer by which a token is multiplied: all matrices, but only those experts to which
            it is routed.
        embedding, head: the input embedding and the output head; a tied one counts where it is used.
        adapters: those of the parameters that belong to adapters; where there are any, only they are trained.
        expert_adapters: those of them in experts.
    """

    layers: int
    parameters: int
    experts: int
    layer_matrices: int
    embedding: int
    head: int
    adapters: int = 0
    expert_adapters: int = 0

    @property
    def trained(self) -> int:
        """The parameters that have gradients and optimizer state."""
        return self.adapters or self.parameters

    @property
    def trained_experts(self) -> int:
        """Those of them in experts."""
        return self.expert_adapters if self.adapters else self.experts


@dataclass(frozen=True)
class LayerMemory:
    """The bytes of one layer per token on this rank, traced through the real layer. All include the layer's input.

    Attributes:
        input: only the input, all that a recomputed layer keeps.
        saved: the bytes kept for the backward pass on the device.
        forward: the peak of live bytes during a forward pass that keeps nothing.
        backward: the peak of live bytes during the forward and backward pass, without off-loaded bytes.
        host: the off-loaded bytes.
    """

    input: float
    saved: float
    forward: float
    backward: float
    host: float = 0.0


@dataclass(frozen=True)
class Shard:
    """A model in a layout.

    Attributes:
        stages: the stages in pipeline order.
        layer: the activations of one layer.
        kv_bytes: bytes of the keys and values of one token in one layer on one rank.
        columns: vocabulary columns of the output head on one rank.
    """

    stages: tuple[Stage, ...]
    layer: LayerMemory
    kv_bytes: int
    columns: int


def lora_config(rank: int, modules: tuple[str, ...], parameters: tuple[str, ...]) -> LoraConfig | None:
    """Adapters as `student.lora` describes them; None for rank 0."""
    return LoraConfig(rank=rank, target_modules=list(modules), target_parameters=list(parameters)) if rank else None


_known: dict[ShardRequest, Shard | str] = {}


def find_shape(path: str | None, key: str) -> str:
    """The directory that describes a model, as an absolute path: `path`, or the published model with its name.

    Raises:
        ConfigError: there is neither; the message names the `key`.
    """
    if not path:
        raise ConfigError(f"{key} is not set: name a model directory, or one of: {', '.join(shape_names())}")
    if (Path(path) / "config.json").is_file():
        return str(Path(path).absolute())  # it is read in a process that runs in another folder
    published = SHAPES / Path(without_revision(path)).name
    if (published / "config.json").is_file():
        return str(published)
    raise ConfigError(f"{key}={path} has no config.json; put one there, or name one of: {', '.join(shape_names())}")


def shape_names() -> list[str]:
    """The names of the published models that can be planned by name alone."""
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def try_shards(requests: Sequence[ShardRequest]) -> list[Shard | str]:
    """Each model in its layout, or the reason why it does not fit that layout.

    Raises:
        KdrlError: the process of the fake world failed.
    """
    new = [request for request in dict.fromkeys(requests) if request not in _known]
    if new:
        done = subprocess.run(
            [sys.executable, "-m", "kdrl_mcore.planning.world"],
            input=json.dumps([asdict(request) for request in new]),
            capture_output=True,
            text=True,
            # The plan is the same with or without a GPU, and must not take its memory.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "1", "RANK": "0", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )
        if done.returncode:
            raise KdrlError(f"the model could not be built in a fake world: {done.stderr.strip().splitlines()[-1:]}")
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
