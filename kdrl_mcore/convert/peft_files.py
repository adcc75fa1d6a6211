"""The two files of a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), read and written without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdrl_mcore.config import LORA_PARAMETERS, LoraConfig
from kdrl_mcore.convert.targets import replacing_folder
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import ADAPTER_CONFIG

PEFT_CONFIG, PEFT_WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of the factors."""
FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"
_OF_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_up_proj|down_proj)(\.lora_[AB]\.weight)")
_STACKED = re.compile(r"(.*\.mlp\.experts)(\.base_layer)?(\.lora_[AB]\.weight)")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
}
"""Settings of PEFT that change what an adapter computes, and the values at which they do not."""


def read_peft_folder(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The rank, alpha and modules of a PEFT folder, and its factors by `HF_MODULE.lora_A.weight` and `HF_MODULE.lora_B.weight`
    (see `stacked_name` for those of experts).

    Raises:
        ModelError: it cannot be read, or has another kind of adapter.
    """
    settings, path = read_peft_config(folder), Path(folder) / PEFT_WEIGHTS
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    rank, alpha, parameters = settings.get("r"), settings.get("lora_alpha"), target_parameters(settings, folder)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(f"{Path(folder) / PEFT_CONFIG} has r={rank} and lora_alpha={alpha}, which are no rank and scale")
    stored = {name.removeprefix(PEFT_PREFIX): value for name, value in stored.items()}
    stacked = {name: value for name, value in stored.items() if is_stacked(name)}
    plain = {name: value for name, value in stored.items() if name not in stacked}
    modules = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in plain})
    factors = {**plain, **_of_each_expert(stacked, parameters, rank, path)}
    for name, value in factors.items():
        if value.dim() != 2 or value.size(0 if name.endswith(FACTOR_A) else 1) != rank:
            raise ModelError(f"{path}: {name} has shape {list(value.shape)}, but {PEFT_CONFIG} says r={rank}")
    return LoraConfig(rank, float(alpha), modules, parameters, str(folder)), factors


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


def target_parameters(settings: Mapping[str, Any], folder: str | Path) -> list[str]:
    """The weights of experts with adapters in a folder's settings, by the names of `student.lora.target_parameters`.

    Raises:
        ModelError: it names another parameter.
    """
    named = settings.get("target_parameters") or []
    known = {name.rpartition(".")[2]: name for name in LORA_PARAMETERS}
    for name in named:
        if name.rpartition(".")[2] not in known:
            raise ModelError(
                f"{Path(folder) / PEFT_CONFIG}: target_parameters names {name}, but only {' and '.join(LORA_PARAMETERS)} are "
                "supported"
            )
    return [known[short] for short in known if any(name.rpartition(".")[2] == short for name in named)]


def stacked_name(name: str, parameters: Sequence[str]) -> tuple[str, int] | None:
    """(the name under which PEFT stores a factor of an expert together with those of the other experts of the layer, the
    expert's number); None for the factor of a module.

    With E experts and rank R, PEFT stores A as [E R, K], and B as [N, R E], in which columns of an expert are E apart. Of two
    parameters of one module it wraps the first in the second, and gives the first one's factors the name of the inner module.

    Args:
        name: `MODULE.experts.E.PARAMETER.lora_A.weight`, or `lora_B`.
        parameters: `student.lora.target_parameters`.
    """
    found = _OF_EXPERT.fullmatch(name)
    if found is None:
        return None
    module, expert, parameter, factor = found.groups()
    outer = [each for each in LORA_PARAMETERS if each in parameters][-1].rpartition(".")[2]
    return f"{module}{'' if parameter == outer else '.base_layer'}{factor}", int(expert)


def is_stacked(name: str) -> bool:
    """Whether a factor in a PEFT folder is that of all experts of a layer."""
    return _STACKED.fullmatch(name) is not None


def of_expert(stacked: Tensor, name: str, expert: int, rank: int) -> Tensor:
    """One expert's factor, of those of all experts of a layer as PEFT stores them."""
    if name.endswith(FACTOR_A):
        return stacked[expert * rank : (expert + 1) * rank]
    return stacked[:, expert :: stacked.size(1) // rank]


def stack_experts(factors: Mapping[str, Tensor], parameters: Sequence[str]) -> dict[str, Tensor]:
    """The factors as PEFT stores them; see `stacked_name`."""
    result: dict[str, Tensor] = {}
    of_layers: dict[str, dict[int, Tensor]] = {}
    for name, value in factors.items():
        place = stacked_name(name, parameters)
        if place is None:
            result[name] = value
        else:
            of_layers.setdefault(place[0], {})[place[1]] = value
    for name, experts in of_layers.items():
        ordered = [experts[number] for number in range(len(experts))]
        result[name] = torch.cat(ordered) if name.endswith(FACTOR_A) else torch.stack(ordered, 2).flatten(1)
    return result


def _of_each_expert(stacked: Mapping[str, Tensor], parameters: Sequence[str], rank: int, path: Path) -> dict[str, Tensor]:
    """The factors of each expert, by their own names.

    Raises:
        ModelError: a factor belongs to no parameter, or is not that of whole experts.
    """
    shorts, result = [name.rpartition(".")[2] for name in parameters], {}
    for name, value in stacked.items():
        module, inner, factor = _STACKED.fullmatch(name).groups()  # type: ignore[union-attr]
        experts, rest = divmod(value.size(0 if factor == FACTOR_A else -1), rank)
        if len(shorts) < (2 if inner else 1) or value.dim() != 2 or rest:
            raise ModelError(
                f"{path}: {name} of shape {list(value.shape)} is not a factor of experts of rank {rank} and the "
                f"target_parameters {list(parameters)} in {PEFT_CONFIG}"
            )
        for expert in range(experts):
            result[f"{module}.{expert}.{shorts[0 if inner else -1]}{factor}"] = of_expert(value, name, expert, rank)
    return result


def write_peft_folder(
    tensors: dict[str, Tensor],
    lora: LoraConfig,
    base: str | Path,
    target: str | Path,
    sources: Sequence[str | Path],
    *,
    overwrite: bool,
) -> None:
    """Write factors as a PEFT folder.

    Args:
        tensors: by the names of `read_peft_folder`.
        base: the model that they belong to, which the folder names.
        sources, overwrite: see `check_target`.

    Raises:
        ModelError: the folder may not be written, or there is not enough space.
    """
    tensors = {PEFT_PREFIX + name: value for name, value in stack_experts(tensors, lora.target_parameters).items()}
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
        "target_parameters": sorted(lora.target_parameters) or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
