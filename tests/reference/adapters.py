"""Adapters that `peft` makes, loads and differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tests.reference import dense

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 6.0,
    modules: Sequence[str] = MODULES,
    parameters: Sequence[str] = (),
) -> Path:
    """Write a PEFT folder whose factors are all random, so that both have a gradient."""
    targets = {"target_modules": list(modules), "target_parameters": list(parameters) or None}
    settings = LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM", **targets)
    model = get_peft_model(dense.load_model(base, torch.float32), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    model.save_pretrained(str(folder), save_embedding_layers=False)  # PEFT would add the base of an adapted head
    return folder


def load_adapted(base: Path, folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model with its adapters; only the adapters have gradients."""
    model = PeftModel.from_pretrained(
        dense.load_model(base, dtype), str(folder), is_trainable=True, autocast_adapter_dtype=False
    )
    return model.to(dtype).eval()


def kdrl_of_adapters(
    base: Path,
    folder: Path,
    teacher: Path,
    rows: Sequence[dense.Row],
    settings: dense.Settings,
    reference: Path | None = None,
    teacher_folder: Path | None = None,
) -> tuple[dense.Result, dict[str, Tensor]]:
    """The loss of one KDRL update, and the gradient of every factor by its name in a PEFT file. The teacher may have adapters,
    too."""
    initial = None if reference is None else dense.load_model(reference)
    teaches = dense.load_model(teacher) if teacher_folder is None else load_adapted(teacher, teacher_folder)
    result = dense.kdrl_of_models(load_adapted(base, folder), teaches, rows, settings, reference=initial)
    return result, {name.replace(".default", ""): gradient for name, gradient in result.gradients.items() if "lora_" in name}


def merged_weights(base: Path, folder: Path) -> dict[str, Tensor]:
    """The weights with the adapters merged into them, in float64."""
    return load_adapted(base, folder).merge_and_unload().state_dict()


def read_factors(folder: Path) -> dict[str, Tensor]:
    """The factors of a PEFT folder by name."""
    return load_file(folder / "adapter_model.safetensors")
