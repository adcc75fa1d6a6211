"""Fingerprints of files and models, by which content is recognised wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kdrl_mcore.convert.folders import is_peft_folder, torch_dist_folder
from kdrl_mcore.model.families import base_of_adapters

WHOLE = 256 * 2**20
SAMPLE = 2**20
"""Bytes. Files up to `WHOLE` are read whole; of larger ones, `SAMPLE` at the beginning, in the middle and at the end."""


def fingerprint(path: str | None) -> str | None:
    """The fingerprint of a file, or of a model directory's weights and tokenizer, which for adapters (a PEFT folder) includes
    their base; None if the path does not exist."""
    source = Path(path) if path else None
    if source is None or not source.exists():
        return None
    if source.is_file():
        files = [source]
    else:
        weights = torch_dist_folder(source) or source
        files = sorted([*source.glob("*.safetensors"), *source.glob("tokenizer.json"), *weights.glob("*.distcp")])
    digest = hashlib.sha256()
    if is_peft_folder(source):
        files.append(source / "adapter_config.json")
        digest.update(f"{fingerprint(str(base_of_adapters(source)))} ".encode())
    for file in files:
        digest.update(f"{file.stat().st_size} ".encode())
        _read_into(digest, file)
    return digest.hexdigest()


def weights_fingerprint(path: str | None) -> str | None:
    """The fingerprint of a model directory, or None if it has no weights (of a teacher on servers, only the tokenizer may be
    here)."""
    if not path or not (any(Path(path).glob("*.safetensors")) or torch_dist_folder(Path(path))):
        return None
    return fingerprint(path)


def _read_into(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while part := file.read(SAMPLE):
                digest.update(part)
            return
        for start in (0, size // 2, size - SAMPLE):
            file.seek(start)
            digest.update(file.read(SAMPLE))
