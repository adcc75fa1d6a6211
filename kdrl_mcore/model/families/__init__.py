"""Model families, one file each: how to read its HF config, and the map of its weights."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, Family

_MODULES = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
FAMILIES: dict[str, Family] = {each.FAMILY.hf_architecture: each.FAMILY for each in _MODULES if hasattr(each, "FAMILY")}
"""The supported families by the name in an HF config's `architectures`."""


ADAPTER_CONFIG = "adapter_config.json"
"""The file that marks a folder as adapters (PEFT)."""


def base_of_adapters(folder: str | Path) -> Path:
    """The folder of the model that the adapters of a PEFT folder belong to.

    Raises:
        ModelError: it names none, or one that does not exist here.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} names no base (base_model_name_or_path): {error!r}") from error
    if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
        raise ModelError(f"{path}: its base {name} is not a model folder here: set base_model_name_or_path to the folder")
    return Path(name)


def config_folder(path: str | Path) -> Path:
    """The folder with config and tokenizer: the folder itself, `model` in a training checkpoint, or for adapters (a PEFT
    folder) that of their base.

    Raises:
        ModelError: adapters name no base that exists here.
    """
    path = Path(path)
    if not (path / "config.json").is_file() and (path / ADAPTER_CONFIG).is_file():
        return base_of_adapters(path)
    return path / "model" if (path / "model" / "config.json").is_file() else path


def read_hf_config(path: str | Path) -> dict:
    """The `config.json` of a model folder.

    Raises:
        ModelError: there is no such directory or file, or the file is not JSON.
    """
    file = config_folder(path) / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_contradiction)
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object: it does not describe a model")
    return config


def _without_contradiction(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these keys and values.

    Raises:
        ValueError: a key has two values, of which JSON readers silently take the last.
    """
    values: dict[str, object] = {}
    for key, value in pairs:
        held = values.setdefault(key, value)
        if held is not value and held != value:
            raise ValueError(f"'{key}' is {held} and {value}")
    return values


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of the model in a folder.

    Raises:
        ModelError: the architecture is unknown, the model brings its own code, or has a feature that is not supported (such
            features are never ignored).
    """
    hf, path = read_hf_config(path), config_folder(path)
    if "auto_map" in hf:
        raise ModelError(f"{path}/config.json brings its own code (auto_map); remote code is never run")
    names = hf.get("architectures") or []
    family = FAMILIES.get(names[0]) if isinstance(names, list) and len(names) == 1 else None
    if family is None:
        raise ModelError(f"{path}/config.json: architecture {names} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    kind = hf.get("model_type")
    if kind is not None and family.model_type not in (None, kind):
        raise ModelError(
            f"{path}/config.json: model_type={kind} does not match {family.hf_architecture} ({family.model_type}): correct "
            "whichever is wrong"
        )
    return family.read(hf, str(path))
