"""Write a running Megatron model as an HF checkpoint that `transformers` and vLLM load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from kdrl_mcore.convert.hf_files import INDEX, write_config
from kdrl_mcore.convert.weight_map import hf_shapes, map_chunk, pieces
from kdrl_mcore.model.families import FAMILIES
from kdrl_mcore.model.gpt import ModelParts


def hf_tensors(parts: ModelParts) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their HF names, whole, on tensor-parallel rank 0; nothing on the others.

    Collectives: one gather over the tensor-parallel group per parameter, so all its ranks must iterate. At most one
        parameter is held
    in full at a time.
    """
    architecture, tensor = parts.architecture, parts.groups.tensor
    rules = FAMILIES[architecture.family].rules(architecture)
    for chunk in parts.chunks:
        for mapped in map_chunk(chunk, rules, tensor.rank(), tensor.size()):
            if not chunk.pre_process and mapped.rule.megatron.startswith("embedding."):
                continue  # the last stage's copy of tied embeddings
            local = mapped.parameter.detach().contiguous()
            shards = [torch.empty_like(local) for _ in range(tensor.size())]
            dist.all_gather(shards, local, group=tensor)
            if tensor.rank() != 0:
                continue
            size = local.shape[1 if mapped.rule.kind == "row" else 0]
            shapes = hf_shapes(mapped.rule, architecture)
            whole = {name: local.new_empty(shape) for name, shape in zip(mapped.hf_names, shapes, strict=True)}
            for rank, shard in enumerate(shards):
                for piece in pieces(mapped.rule, mapped.hf_names, architecture, rank, tensor.size(), size):
                    target = whole[piece.hf].narrow(piece.dim, piece.hf_start, piece.length)
                    target.copy_(shard.narrow(piece.dim, piece.start, piece.length))
            yield from whole.items()


def export_hf(parts: ModelParts, source: str | Path, target: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write the model to `target`, with config and tokenizer from `source`. Collective over the world.

    Each pipeline stage of one replica writes its own files, at most `max_shard_bytes` each (or one tensor). They are written
    aside: `target` is replaced when all of them are complete, or left as it was.
    """
    target = Path(target)
    aside = target.with_name(f".{target.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    written: dict[str, list[str]] = {}
    total = 0
    if parts.groups.replicas.rank() == 0:
        pending: dict[str, Tensor] = {}
        size = 0

        def flush() -> None:
            nonlocal size
            if pending:
                name = f"stage{parts.groups.pipeline.rank()}-{len(written)}.safetensors"
                save_file(pending, aside / name, metadata={"format": "pt"})
                written[name] = list(pending)
                pending.clear()
                size = 0

        for name, tensor in hf_tensors(parts):
            nbytes = tensor.numel() * tensor.element_size()
            if size + nbytes > max_shard_bytes:
                flush()
            pending[name] = tensor.cpu()
            size += nbytes
            total += nbytes
        flush()
    gathered: list[tuple[dict[str, list[str]], int]] = [({}, 0)] * dist.get_world_size()
    dist.all_gather_object(gathered, (written, total))
    if dist.get_rank() == 0:
        _finish(aside, [item for item in gathered if item[0]], Path(source), parts.config.params_dtype)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    dist.barrier()


def _finish(aside: Path, stages: list[tuple[dict[str, list[str]], int]], source: Path, dtype: torch.dtype) -> None:
    """Name the files as HF does, write the index and the side files."""
    files = [(name, tensors) for written, _ in stages for name, tensors in written.items()]
    weight_map = {}
    for number, (name, tensors) in enumerate(files, 1):
        final = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(aside / name, aside / final)
        weight_map.update(dict.fromkeys(tensors, final))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in stages)}, "weight_map": dict(sorted(weight_map.items()))}
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    write_config(source, aside, dtype)
