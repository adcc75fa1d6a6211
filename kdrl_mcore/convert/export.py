"""Write a running Megatron model as an HF checkpoint that `transformers` and vLLM load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.convert.byte_ranges import num_elements, raw_bytes, write_at
from kdrl_mcore.convert.convert import write_kept
from kdrl_mcore.convert.hf_files import KEPT, Described, lay_out, shard_name, split_into_shards, write_config, write_index
from kdrl_mcore.convert.parameters import MappedParameter, map_chunk
from kdrl_mcore.convert.targets import begin, put_in_place
from kdrl_mcore.convert.weight_map import TensorSlice, hf_shapes, tensor_slices
from kdrl_mcore.errors import CheckpointError, KdrlError
from kdrl_mcore.model.families import FAMILIES
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.parallel.collect import gather_objects


def hf_tensors(parts: ModelParts, *, experts_only: bool = False) -> Iterator[tuple[str, Tensor | None]]:
    """This pipeline stage's whole tensors under their HF names, adapters merged into them, on tensor-parallel rank 0; each rank
    also yields its own experts. The other tensor-parallel ranks get None in place of the gathered tensors, so that all iterate
    in step.

    Collectives: one gather over the tensor-parallel group per parameter (none with `experts_only`), so all its ranks must
    iterate. At most one parameter is held in full at a time; a tensor may be a view of it.
    """
    architecture, tensor = parts.architecture, parts.groups.tensor
    for mapped in mapped_parameters(parts):
        rule = mapped.rule
        if experts_only and not rule.is_expert:
            continue
        local = mapped.value().contiguous()
        shards, ranks = [local], 1 if rule.is_expert else tensor.size()
        if ranks > 1:
            shards = [torch.empty_like(local) for _ in range(ranks if tensor.rank() == 0 else 0)]
            dist.gather(local, shards or None, dst=dist.get_global_rank(tensor, 0), group=tensor)
            if tensor.rank() != 0:
                yield from ((name, None) for name in mapped.hf_names)
                continue
        size = local.shape[1 if rule.kind == "row" else 0]
        found = [
            (tensor_slice, shard.narrow(tensor_slice.dim, tensor_slice.start, tensor_slice.length))
            for rank, shard in enumerate(shards)
            for tensor_slice in tensor_slices(rule, mapped.hf_names, architecture, rank, ranks, size)
        ]
        for name, shape in zip(mapped.hf_names, hf_shapes(rule, architecture), strict=True):
            yield name, _join([(tensor_slice, part) for tensor_slice, part in found if tensor_slice.hf == name], shape)


def _join(found: Sequence[tuple[TensorSlice, Tensor]], shape: tuple[int, ...]) -> Tensor:
    """One HF tensor from its slices: a view where there is only one."""
    if len(found) == 1 and found[0][1].shape == shape:
        return found[0][1]
    whole = found[0][1].new_empty(shape)
    for tensor_slice, part in found:
        whole.narrow(tensor_slice.dim, tensor_slice.hf_start, tensor_slice.length).copy_(part)
    return whole


def mapped_parameters(parts: ModelParts) -> Iterator[MappedParameter]:
    """Every parameter of this rank except the last stage's copy of tied embeddings."""
    rules = FAMILIES[parts.architecture.family].rules(parts.architecture)
    for chunk in parts.chunks:
        for mapped in map_chunk(chunk, rules, parts.groups):
            if chunk.pre_process or not mapped.rule.megatron.startswith("embedding."):
                yield mapped


def owned_tensors(parts: ModelParts) -> Described:
    """Shape and dtype of the HF tensors that this rank owns. Each tensor of the model has one owner in the world:
    tensor-parallel rank 0 of its stage in the first replica, or the first rank that holds the expert."""
    first_replica, first_experts = parts.groups.replicas.rank() == 0, parts.groups.groups.expt_dp.rank() == 0
    owned: Described = {}
    for mapped in mapped_parameters(parts):
        if first_experts if mapped.rule.is_expert else first_replica and parts.groups.tensor.rank() == 0:
            for name, shape in zip(mapped.hf_names, hf_shapes(mapped.rule, parts.architecture), strict=True):
                owned[name] = (shape, mapped.parameter.dtype)
    return owned


@dataclass
class _Written:
    """What one rank wrote: its files with their tensors, the number of bytes, and the error if writing failed."""

    files: list[tuple[str, list[str]]] = field(default_factory=list)
    num_bytes: int = 0
    error: str | None = None


def export_hf(parts: ModelParts, source: str | Path, target: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write the model to `target`, with config and tokenizer from `source`. Collective over the world.

    One rank of each pipeline stage, and of each share of experts, writes its own files, of at most `max_shard_bytes` (or one
    tensor) each, a parameter at a time. They go into a temporary folder: an earlier export at `target` is replaced only once
    all of them are complete, and anything else there is never replaced (`check_target`).

    Raises:
        CheckpointError: on every rank, if any of them cannot write.
    """
    temporary = Path(on_rank_0(lambda: str(begin(target, [source], overwrite=True)), target))
    written = _write_own(parts, temporary, max_shard_bytes)
    gathered = gather_objects(written)
    errors = [each.error for each in gathered if each.error]

    def complete() -> None:
        try:
            if errors:
                raise CheckpointError(errors[0])
            files = [file for each in gathered for file in each.files]
            num_bytes = sum(each.num_bytes for each in gathered)
            if kept := write_kept(source, temporary / KEPT):
                files.append((KEPT, list(kept)))
                num_bytes += sum(num_elements(shape) * dtype.itemsize for shape, dtype in kept.values())
            for number, (name, _) in enumerate(files, 1):
                os.replace(temporary / name, temporary / shard_name(number, len(files)))
            write_index(temporary, [tensors for _, tensors in files], num_bytes)
            write_config(Path(source), temporary, parts.config.params_dtype)
            put_in_place(temporary, target, [source], overwrite=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    on_rank_0(complete, target)


def on_rank_0(act: Callable[[], Any], target: str | Path) -> Any:
    """Run an action on rank 0 and return its result on every rank. Collective over the world.

    Raises:
        CheckpointError: on every rank, if the action failed.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except (OSError, KdrlError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(f"cannot write {target}: {outcome[1]}")
    return outcome[0]


def _write_own(parts: ModelParts, folder: Path, max_shard_bytes: int) -> _Written:
    """Write the tensors that this rank owns. All ranks of the first replica take part in its gathers."""
    first_replica, owned, result = parts.groups.replicas.rank() == 0, owned_tensors(parts), _Written()
    try:
        laid_out = {}
        for number, shard in enumerate(split_into_shards(owned, max_shard_bytes) if owned else []):
            file = f"rank{dist.get_rank()}-{number}.safetensors"
            laid_out.update(lay_out(folder / file, {name: owned[name] for name in shard}))
            result.files.append((file, shard))
    except OSError as error:
        result.error = str(error)
    result.num_bytes = sum(num_elements(shape) * dtype.itemsize for shape, dtype in owned.values())
    if not first_replica and not owned:
        return result
    for name, tensor in hf_tensors(parts, experts_only=not first_replica):
        if name in owned and result.error is None:
            assert tensor is not None
            try:
                with laid_out[name].path.open("r+b", buffering=0) as opened:
                    write_at(opened, raw_bytes(tensor.cpu()), laid_out[name].offset)
            except OSError as error:
                result.error = str(error)  # keep gathering: the other ranks wait for this one
    return result
