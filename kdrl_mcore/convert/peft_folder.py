"""Adapters as a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), which `peft` and vLLM can load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.convert.export import on_rank_0
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.convert.folders import is_peft_folder
from kdrl_mcore.convert.hf_files import Described
from kdrl_mcore.convert.peft_files import (
    FACTOR_A,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    of_expert,
    read_peft_config,
    stacked_name,
    target_parameters,
    write_peft_folder,
)
from kdrl_mcore.errors import ConfigError, ModelError
from kdrl_mcore.model.families import base_of_adapters
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.model.lora import ADAPTER
from kdrl_mcore.model.lora_factors import Factor, factors_by_name
from kdrl_mcore.model.lora_targets import HEAD, linears_of_layer
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.resilience.waiting import waits_for_others


def factor_names(architecture: Architecture, lora: LoraConfig) -> list[str]:
    """The names in a PEFT file of all the factors of a model, layer by layer."""
    names = [
        f"model.layers.{layer}.{linear.hf}.{'0.' if linear.of_experts else ''}{projection}.lora_{factor}.weight"
        for layer in range(architecture.num_layers)
        for linear in linears_of_layer(architecture, layer, lora)
        for projection in linear.chosen(lora)
        for factor in "AB"
    ]
    names += [f"{projection}.lora_{factor}.weight" for projection in HEAD.chosen(lora) for factor in "AB"]
    return [PEFT_PREFIX + (stacked_name(name, lora.target_parameters) or (name, 0))[0] for name in names]


@torch.no_grad()
def load_adapters(parts: ModelParts, folder: str | Path, lora: LoraConfig, adapter: str = ADAPTER) -> None:
    """Fill this rank's adapters from a PEFT folder, cast to the model's dtype. No communication.

    Args:
        adapter: which ones: those that are trained (`ADAPTER`), or those that teach.

    Raises:
        ModelError: the folder does not hold these adapters of this model, or is damaged.
    """
    check_peft_folder(folder, lora)
    path = Path(folder) / PEFT_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            found, expected = set(file.keys()), set(factor_names(parts.architecture, lora))
            for names, problem in (
                (expected - found, "has no"),
                (found - expected, "has, besides the expected factors,"),
            ):
                if names:
                    advice = ""
                    if adapter == ADAPTER:
                        advice = ": set student.lora.target_modules and target_parameters to its own"
                    raise ModelError(f"{path} {problem} {min(names)} ({len(names)} in all){advice}")
            read = lru_cache(maxsize=4)(file.get_tensor)  # the factors of all experts of a layer, which are read one by one
            for factor in (each for chunk in parts.chunks for each in factors_by_name(chunk, adapter)):
                factor.parameter.copy_(_read_share(factor, parts.groups, file, read, lora, path))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _read_share(
    factor: Factor, groups: ModelGroups, file: Any, read: Callable[[str], Tensor], lora: LoraConfig, path: Path
) -> Tensor:
    """This rank's share of a factor.

    Raises:
        ModelError: the stored one has another shape.
    """
    place, whole = stacked_name(factor.name, lora.target_parameters), factor.whole
    name = PEFT_PREFIX + (factor.name if place is None else place[0])
    stored, tensor = file.get_slice(name), groups.tensor
    if factor.expert is not None:
        grown = 0 if name.endswith(FACTOR_A) else 1
        whole = tuple(size * (factor.expert[1] if dim == grown else 1) for dim, size in enumerate(whole))  # type: ignore[assignment]
    if tuple(stored.get_shape()) != whole:
        raise ModelError(f"{path}: {name} has shape {tuple(stored.get_shape())}, but the model and rank give {whole}")
    if factor.expert is not None:
        return of_expert(read(name), name, factor.expert[0], lora.rank)
    sizes = factor.parameter.shape
    starts = [tensor.rank() * size if dim == factor.split else 0 for dim, size in enumerate(sizes)]
    stops = [min(start + size, most) for start, size, most in zip(starts, sizes, whole, strict=True)]
    rows, columns = (slice(min(start, stop), stop) for start, stop in zip(starts, stops, strict=True))
    share: Tensor = stored[rows, columns]
    return share if share.shape == sizes else F.pad(share, (0, 0, 0, sizes[0] - len(share)))


def check_peft_folder(folder: str | Path, lora: LoraConfig) -> None:
    """Check that a folder's adapters compute what `student.lora` describes.

    Raises:
        ModelError: it has no readable adapter_config.json, or another rank, alpha or kind of adapter.
    """
    path, settings = Path(folder) / PEFT_CONFIG, read_peft_config(folder)
    target_parameters(settings, folder)
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
    """On rank 0 the whole factors, in host memory, by their own names (`Factor`); empty on other ranks. Collective over the
    world."""
    mine = [
        (factor.name, factor.split, factor.whole[0], parts.groups.tensor.rank(), factor.parameter.detach().cpu())
        for chunk in parts.chunks
        for factor in factors_by_name(chunk)
        if not any(factor.replica(parts.groups))
    ]
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    shares: dict[str, list[tuple[int, int | None, Tensor]]] = {}
    rows: dict[str, int] = {}
    for name, dim, rows[name], rank, share in (each for part in everyone or () for each in part):
        shares.setdefault(name, []).append((rank, dim, share))
    return {name: _joined(parts)[: rows[name]] for name, parts in shares.items()}


def factor_shapes(parts: ModelParts) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole factors of this rank's layers, by their names in a PEFT file; not for those of experts. No
    communication."""
    factors = (factor for chunk in parts.chunks for factor in factors_by_name(chunk))
    return {PEFT_PREFIX + factor.name: factor.whole for factor in factors}


def owned_factors(parts: ModelParts) -> Described:
    """Shape and dtype of the whole factors that this rank owns: tensor-parallel rank 0 of each stage in the first replica."""
    owns = parts.groups.replicas.rank() == 0 and parts.groups.tensor.rank() == 0
    return {name: (shape, parts.config.params_dtype) for name, shape in factor_shapes(parts).items() if owns}


def whole_factors(parts: ModelParts) -> Iterator[tuple[str, Tensor | None]]:
    """The factors of this rank's layers by their names in a PEFT file, whole on tensor-parallel rank 0 and None on the others;
    not for those of experts. One gather over the tensor-parallel group for each factor that its ranks split, so all of them
    must iterate."""
    tensor = parts.groups.tensor
    for factor in (each for chunk in parts.chunks for each in factors_by_name(chunk)):
        local = factor.parameter.detach().contiguous()
        shares = [local]
        if factor.split is not None and tensor.size() > 1:
            shares = [torch.empty_like(local) for _ in range(tensor.size() if tensor.rank() == 0 else 0)]
            dist.gather(local, shares or None, dst=dist.get_global_rank(tensor, 0), group=tensor)
        whole = torch.cat(shares, factor.split or 0).contiguous() if tensor.rank() == 0 else None
        yield PEFT_PREFIX + factor.name, whole


def _joined(shares: list[tuple[int, int | None, Tensor]]) -> Tensor:
    ordered, dim = sorted(shares, key=lambda share: share[0]), shares[0][1]
    return torch.cat([share for _, _, share in ordered], dim=dim or 0).contiguous()
