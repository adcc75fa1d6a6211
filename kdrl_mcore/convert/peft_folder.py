"""Adapters as a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), which `peft` and vLLM can load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.convert.export import on_rank_0
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.convert.folders import is_peft_folder
from kdrl_mcore.convert.hf_files import Described
from kdrl_mcore.convert.peft_files import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, read_peft_config, write_peft_folder
from kdrl_mcore.errors import ConfigError, ModelError
from kdrl_mcore.model.families import base_of_adapters
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.model.lora import ADAPTABLE_LINEARS, ADAPTER, factors_by_name
from kdrl_mcore.resilience.waiting import waits_for_others


def factor_names(architecture: Architecture, lora: LoraConfig) -> list[str]:
    """The names of all the factors of a model, layer by layer."""
    return [
        f"{PEFT_PREFIX}model.layers.{layer}.{linear.hf}.{projection}.lora_{factor}.weight"
        for layer in range(architecture.num_layers)
        for linear in ADAPTABLE_LINEARS
        for projection in linear.projections
        if projection in lora.target_modules
        for factor in "AB"
    ]


@torch.no_grad()
def load_adapters(parts: ModelParts, folder: str | Path, lora: LoraConfig, adapter: str = ADAPTER) -> None:
    """Fill this rank's adapters from a PEFT folder, cast to the model's dtype. No communication.

    Args:
        adapter: which ones: those that are trained (`ADAPTER`), or those that teach.

    Raises:
        ModelError: the folder does not hold these adapters of this model, or is damaged.
    """
    check_peft_folder(folder, lora)
    path, tensor = Path(folder) / PEFT_WEIGHTS, parts.groups.tensor
    try:
        with safe_open(path, framework="pt") as file:
            found, expected = set(file.keys()), set(factor_names(parts.architecture, lora))
            for names, problem in (
                (expected - found, "has no"),
                (found - expected, "has, besides the expected factors,"),
            ):
                if names:
                    advice = ": set student.lora.target_modules to its modules" if adapter == ADAPTER else ""
                    raise ModelError(f"{path} {problem} {min(names)} ({len(names)} in all){advice}")
            for name, parameter, split in (each for chunk in parts.chunks for each in factors_by_name(chunk, adapter)):
                stored = file.get_slice(PEFT_PREFIX + name)
                ranks = [tensor.size() if dim == split else 1 for dim in range(2)]
                whole = tuple(size * times for size, times in zip(parameter.shape, ranks, strict=True))
                if tuple(stored.get_shape()) != whole:
                    raise ModelError(
                        f"{path}: {name} has shape {tuple(stored.get_shape())}, but the model and rank give {whole}"
                    )
                starts = [tensor.rank() * size if dim == split else 0 for dim, size in enumerate(parameter.shape)]
                rows, columns = (slice(start, start + size) for start, size in zip(starts, parameter.shape, strict=True))
                parameter.copy_(stored[rows, columns])
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def check_peft_folder(folder: str | Path, lora: LoraConfig) -> None:
    """Check that a folder's adapters compute what `student.lora` describes.

    Raises:
        ModelError: it has no readable adapter_config.json, or another rank, alpha or kind of adapter.
    """
    path, settings = Path(folder) / PEFT_CONFIG, read_peft_config(folder)
    for key, ours, value in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha)):
        if settings.get(key) != value:
            raise ModelError(f"{path} has {key}={settings.get(key)}, but student.lora.{ours}={value:g}: set it to the folder's")


def check_teacher_adapters(folder: str | Path, student: str | Path) -> None:
    """Check that the adapters of `teacher.weights=adapters` belong to the student's base.

    Raises:
        ConfigError, ModelError: they belong to another model, or name none that exists here.
    """
    if not is_peft_folder(folder):
        raise ConfigError(f"teacher.weights=adapters, but teacher.path={folder} is not a PEFT folder: set teacher.weights=path")
    base = base_of_adapters(folder)
    if base.resolve() != Path(student).resolve() and fingerprint(str(base)) != fingerprint(str(student)):
        raise ConfigError(
            f"teacher.weights=adapters, but the adapters in {folder} belong to {base}, not to the student's base {student}: "
            "set teacher.weights=path, with which they are merged into their own base"
        )


def check_student_base(student: str | Path) -> None:
    """Check that the model below the student's adapters is a whole model, which an exported PEFT folder can name.

    Raises:
        ConfigError: it is itself a base with adapters.
    """
    if is_peft_folder(student):
        raise ConfigError(
            f"student.path={student} holds adapters: set student.path to their base and student.lora.path to this folder"
        )


@waits_for_others
def export_adapters(parts: ModelParts, lora: LoraConfig, base: str | Path, target: str | Path) -> None:
    """Write the adapters as a PEFT folder, which replaces an earlier export. Collective over the world: rank 0 gathers the
    factors from the first replica.

    Args:
        base: the frozen model's path, which the folder names.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    tensors = gather_factors(parts)
    on_rank_0(lambda: write_peft_folder(tensors, lora, base, target, [base], overwrite=True), target)


def gather_factors(parts: ModelParts) -> dict[str, Tensor]:
    """On rank 0 the whole factors, in host memory, by their names in a PEFT file; empty on other ranks. Collective over the
    world."""
    mine = [
        (PEFT_PREFIX + name, dim, parts.groups.tensor.rank(), parameter.detach().cpu())
        for chunk in parts.chunks
        for name, parameter, dim in factors_by_name(chunk)
        if parts.groups.replicas.rank() == 0 and (dim is not None or parts.groups.tensor.rank() == 0)
    ]
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    shares: dict[str, list[tuple[int, int | None, Tensor]]] = {}
    for name, dim, rank, share in (each for part in everyone or () for each in part):
        shares.setdefault(name, []).append((rank, dim, share))
    return {name: _joined(parts) for name, parts in shares.items()}


def factor_shapes(parts: ModelParts) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole factors of this rank's layers, by their names in a PEFT file. No communication."""
    ranks = parts.groups.tensor.size()
    return {
        PEFT_PREFIX + name: tuple(size * (ranks if dim == split else 1) for dim, size in enumerate(parameter.shape))
        for chunk in parts.chunks
        for name, parameter, split in factors_by_name(chunk)
    }


def owned_factors(parts: ModelParts) -> Described:
    """Shape and dtype of the whole factors that this rank owns: tensor-parallel rank 0 of each stage in the first replica."""
    owns = parts.groups.replicas.rank() == 0 and parts.groups.tensor.rank() == 0
    return {name: (shape, parts.config.params_dtype) for name, shape in factor_shapes(parts).items() if owns}


def whole_factors(parts: ModelParts) -> Iterator[tuple[str, Tensor | None]]:
    """The factors of this rank's layers by their names in a PEFT file, whole on tensor-parallel rank 0 and None on the others.
    One gather over the tensor-parallel group for each factor that its ranks split, so all of them must iterate."""
    tensor = parts.groups.tensor
    for name, parameter, dim in (each for chunk in parts.chunks for each in factors_by_name(chunk)):
        local = parameter.detach().contiguous()
        shares = [local]
        if dim is not None and tensor.size() > 1:
            shares = [torch.empty_like(local) for _ in range(tensor.size() if tensor.rank() == 0 else 0)]
            dist.gather(local, shares or None, dst=dist.get_global_rank(tensor, 0), group=tensor)
        yield PEFT_PREFIX + name, torch.cat(shares, dim or 0).contiguous() if tensor.rank() == 0 else None


def _joined(shares: list[tuple[int, int | None, Tensor]]) -> Tensor:
    ordered, dim = sorted(shares, key=lambda share: share[0]), shares[0][1]
    return torch.cat([share for _, _, share in ordered], dim=dim or 0).contiguous()
