"""Functions that the ranks of the conversion tests run: they build a model in some layout, load it, and report."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kdrl_mcore.parallel.platform import prepare_platform

prepare_platform()

from kdrl_mcore.config import ModelConfig  # noqa: E402
from kdrl_mcore.convert.load import load_weights  # noqa: E402
from kdrl_mcore.model.families import read_architecture  # noqa: E402
from kdrl_mcore.model.gpt import ModelParts, build_model  # noqa: E402
from kdrl_mcore.parallel.layout import Layout, create_scoring_groups, create_student_groups  # noqa: E402
from kdrl_mcore.parallel.packing import pack  # noqa: E402


def build(path: str, layout: dict[str, Any], *, student: bool = False, dtype: str = "float32") -> ModelParts:
    """The model of a directory, built in a layout and loaded."""
    architecture = read_architecture(path)
    create = create_student_groups if student else create_scoring_groups
    groups = create(Layout(dist.get_world_size(), **layout))
    parts = build_model(architecture, ModelConfig(dtype=dtype), groups, vocab_size=architecture.vocab_size, trainable=student)
    load_weights(parts, path)
    return parts


@torch.no_grad()
def logits(path: str, layout: dict[str, Any], sequences: list[list[int]]) -> np.ndarray | None:
    """The logits [tokens of all sequences, vocabulary] of packed sequences, from tensor-parallel rank 0 of the last stage."""
    # Sequence parallelism needs the random states that only the student's groups set up.
    parts = build(path, layout, student=layout.get("sequence_parallel", False))
    groups, (chunk,) = parts.groups, parts.chunks
    empty = np.empty(0, dtype=np.int64)
    batch = pack([(index, np.array(tokens), empty) for index, tokens in enumerate(sequences)], groups.layout.token_alignment)
    stage, stages = groups.pipeline.rank(), groups.pipeline.size()
    if stage > 0:
        received = torch.empty(
            len(batch.tokens_S) // (groups.layout.tensor if groups.layout.sequence_parallel else 1),
            1,
            parts.architecture.hidden_size,
        )
        dist.recv(received, dist.get_global_rank(groups.pipeline, stage - 1))
        chunk.set_input_tensor(received)
    hidden = chunk.run_batch(batch)
    if stage < stages - 1:
        dist.send(hidden.contiguous(), dist.get_global_rank(groups.pipeline, stage + 1))
        return None
    if groups.layout.sequence_parallel:
        shares = [torch.empty_like(hidden) for _ in range(groups.tensor.size())]
        dist.all_gather(shares, hidden, group=groups.tensor)
        hidden = torch.cat(shares)
    local = hidden.squeeze(1) @ chunk.head_weight().T
    columns = [torch.empty_like(local) for _ in range(groups.tensor.size())]
    dist.all_gather(columns, local, group=groups.tensor)
    whole = torch.cat(columns, dim=1)[: sum(map(len, sequences)), : parts.architecture.vocab_size]
    return whole.numpy() if groups.tensor.rank() == 0 else None


def save_with_megatron(path: str, folder: str) -> None:
    """Load a model and save it with Megatron-Core's checkpointing."""
    from megatron.core import dist_checkpointing

    (chunk,) = build(path, {}, student=True).chunks
    dist_checkpointing.save(chunk.sharded_state_dict(), folder)


@torch.no_grad()
def megatron_loads_the_same(path: str, converted: str, layout: dict[str, Any]) -> bool:
    """Whether Megatron-Core loads from a converted checkpoint what `load_weights` loads from the HF folder."""
    from megatron.core import dist_checkpointing

    parts = build(path, layout, student=True)
    state = parts.chunks[0].state_dict()  # Transformer Engine's layers add bytes of their own
    held = {name: value for name, value in state.items() if torch.is_tensor(value) and value.is_floating_point()}
    expected = {name: value.clone() for name, value in held.items()}
    for value in held.values():
        value.fill_(float("nan"))
    loaded = dist_checkpointing.load(parts.chunks[0].sharded_state_dict(), f"{converted}/release")
    parts.chunks[0].load_state_dict(loaded, strict=False)
    return all(torch.equal(value, expected[name]) for name, value in held.items())


def export_and_save(path: str, layout: dict[str, Any], exported: str, saved: str) -> None:
    """Load a model, export it from memory, and save it as Megatron-Core does in a training checkpoint."""
    from pathlib import Path

    from megatron.core import dist_checkpointing

    from kdrl_mcore.checkpointing.writer import copy_model
    from kdrl_mcore.convert.export import export_hf

    parts = build(path, layout, student=True)
    export_hf(parts, path, exported, max_shard_bytes=100_000)
    if dist.get_rank() == 0:
        (Path(saved) / "weights").mkdir(parents=True)
        copy_model(Path(path), Path(saved) / "model")
    dist.barrier()
    dist_checkpointing.save({"model": parts.chunks[0].sharded_state_dict()}, f"{saved}/weights")
    dist.barrier()


def train(overrides: list[str]) -> int:
    """Run a whole training job on the pool's ranks; returns the exit code."""
    from kdrl_mcore.cli.train import main

    return main(overrides)
