"""Adapters as a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), which `peft` and vLLM can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.convert.export import on_rank_0
from kdrl_mcore.convert.targets import replacing_folder
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.model.lora import ADAPTABLE_LINEARS, factors_by_name
from kdrl_mcore.resilience.waiting import waits_for_others

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layers_to_transform": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
}
"""Settings of PEFT that change what an adapter computes, and the values at which they do not."""


def factor_names(architecture: Architecture, lora: LoraConfig) -> list[str]:
    """The names of all the factors of a model, layer by layer."""
    return [
        f"{_PREFIX}model.layers.{layer}.{linear.hf}.{projection}.lora_{factor}.weight"
        for layer in range(architecture.num_layers)
        for linear in ADAPTABLE_LINEARS
        for projection in linear.projections
        if projection in lora.target_modules
        for factor in "AB"
    ]


@torch.no_grad()
def load_adapters(parts: ModelParts, folder: str | Path, lora: LoraConfig) -> None:
    """Fill this rank's adapters from a PEFT folder, cast to the model's dtype. No communication.

    Raises:
        ModelError: the folder does not hold these adapters of this model, or is damaged.
    """
    check_peft_folder(folder, lora)
    path, tensor = Path(folder) / WEIGHTS, parts.groups.tensor
    try:
        with safe_open(path, framework="pt") as file:
            found, expected = set(file.keys()), set(factor_names(parts.architecture, lora))
            for names, problem in (
                (expected - found, "has no"),
                (found - expected, "has, besides student.lora's factors,"),
            ):
                if names:
                    raise ModelError(
                        f"{path} {problem} {min(names)} ({len(names)} in all): set student.lora.target_modules to its modules"
                    )
            for name, parameter, split in (each for chunk in parts.chunks for each in factors_by_name(chunk)):
                stored = file.get_slice(_PREFIX + name)
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
    path = Path(folder) / CONFIG
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"student.lora.path={folder} is not a PEFT folder: {CONFIG} cannot be read ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ModelError(f"{path}: only adapters of peft_type LORA can be trained")
    for key, allowed in _NEUTRAL.items():
        if key in settings and settings[key] not in allowed:
            raise ModelError(f"{path}: {key}={settings[key]!r} is not supported, only {allowed[0]!r}")
    for key, ours, value in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha)):
        if settings.get(key) != value:
            raise ModelError(f"{path} has {key}={settings.get(key)}, but student.lora.{ours}={value:g}: set it to the folder's")


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

    def write() -> None:
        size = sum(each.numel() * each.element_size() for each in tensors.values())
        with replacing_folder(target, size, [base], overwrite=True) as temporary:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / CONFIG).write_text(json.dumps(peft_config(lora, base), indent=2) + "\n")

    on_rank_0(write, target)


def gather_factors(parts: ModelParts) -> dict[str, Tensor]:
    """On rank 0 the whole factors, in host memory, by their names in a PEFT file; empty on other ranks. Collective over the
    world."""
    mine = [
        (_PREFIX + name, dim, parts.groups.tensor.rank(), parameter.detach().cpu())
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


def _joined(shares: list[tuple[int, int | None, Tensor]]) -> Tensor:
    ordered, dim = sorted(shares, key=lambda share: share[0]), shares[0][1]
    return torch.cat([share for _, _, share in ordered], dim=dim or 0).contiguous()


def peft_config(lora: LoraConfig, base: str | Path) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
