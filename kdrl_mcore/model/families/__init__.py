"""Model families: each is one file with what its HF config means and where its weights go."""

from __future__ import annotations

import json
from pathlib import Path

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import llama, qwen2, qwen3, qwen3_moe
from kdrl_mcore.model.families.base import Architecture, Family

FAMILIES: dict[str, Family] = {module.FAMILY.hf_architecture: module.FAMILY for module in (llama, qwen2, qwen3, qwen3_moe)}
"""The supported families by the name in an HF config's `architectures`."""


def read_hf_config(path: str | Path) -> dict:
    """The `config.json` of an HF model directory.

    Raises:
        ModelError: no such directory or file, or it is not JSON.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error


def read_architecture(path: str | Path) -> Architecture:
    """What the model in an HF directory is made of.

    Raises:
        ModelError: an unknown architecture, code of its own, or a feature that is not supported (never ignored).
    """
    hf = read_hf_config(path)
    if "auto_map" in hf:
        raise ModelError(f"{path}/config.json brings its own code (auto_map); remote code is never run")
    names = hf.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name].read(hf, str(path))
    raise ModelError(f"{path}/config.json: architecture {names} is not supported; supported: {', '.join(sorted(FAMILIES))}")
