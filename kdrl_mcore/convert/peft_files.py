"""The two files of a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), read and written without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.convert.targets import replacing_folder
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import ADAPTER_CONFIG

PEFT_CONFIG, PEFT_WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of the factors."""
FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"
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


def read_peft_folder(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The rank, alpha and modules of a PEFT folder, and its factors by `HF_MODULE.lora_A.weight` and `HF_MODULE.lora_B.weight`.

    Raises:
        ModelError: it cannot be read, or has another kind of adapter.
    """
    settings, path = read_peft_config(folder), Path(folder) / PEFT_WEIGHTS
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    factors = {name.removeprefix(PEFT_PREFIX): value for name, value in stored.items()}
    modules = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in factors})
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(f"{Path(folder) / PEFT_CONFIG} has r={rank} and lora_alpha={alpha}, which are no rank and scale")
    for name, value in factors.items():
        if value.dim() != 2 or value.size(0 if name.endswith(FACTOR_A) else 1) != rank:
            raise ModelError(f"{path}: {name} has shape {list(value.shape)}, but {PEFT_CONFIG} says r={rank}")
    return LoraConfig(rank=rank, alpha=float(alpha), target_modules=modules, path=str(folder)), factors


def read_peft_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT folder, whose adapters are those of LoRA, y = x W^T + (lora_alpha / r) x A^T B^T.

    Raises:
        ModelError: it cannot be read, or describes another kind of adapter.
    """
    path = Path(folder) / PEFT_CONFIG
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is not a PEFT folder: {PEFT_CONFIG} cannot be read ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ModelError(f"{path}: only adapters of peft_type LORA can be used")
    for key, allowed in _NEUTRAL.items():
        if key in settings and settings[key] not in allowed:
            raise ModelError(f"{path}: {key}={settings[key]!r} is not supported, only {allowed[0]!r}")
    return settings


def write_peft_folder(
    tensors: dict[str, Tensor],
    lora: LoraConfig,
    base: str | Path,
    target: str | Path,
    sources: Sequence[str | Path],
    *,
    overwrite: bool,
) -> None:
    """Write factors, under their names in the folder, as a PEFT folder.

    Args:
        base: the model that they belong to, which the folder names.
        sources, overwrite: see `check_target`.

    Raises:
        ModelError: the folder may not be written, or there is not enough space.
    """
    size = sum(each.numel() * each.element_size() for each in tensors.values())
    with replacing_folder(target, size, sources, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / PEFT_WEIGHTS, metadata={"format": "pt"})
        (temporary / PEFT_CONFIG).write_text(json.dumps(peft_config(lora, base), indent=2) + "\n")


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
