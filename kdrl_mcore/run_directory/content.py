"""Check that paths still hold what a run began with: fingerprints of models and data, and the student's architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdrl_mcore.checkpointing.checkpoint import MODEL_DIR
from kdrl_mcore.config import flatten
from kdrl_mcore.config.keys import general_name
from kdrl_mcore.config.resuming import RULES
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import read_architecture

SOURCES = "data.sources"
CONTENT_KEYS = frozenset(key for key, rule in RULES.items() if rule.effect == "content")


def fingerprints(flat: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints, by key, of every path in a flat configuration whose content matters; paths that are not on disk (a hub
    id) have none."""
    content = {key: path for key, path in flat.items() if general_name(key) in CONTENT_KEYS}
    found = {key: digest for key, path in content.items() if (digest := fingerprint(path)) is not None}
    sources = [fingerprint(source["path"]) for source in flat.get(SOURCES) or ()]
    return found | ({SOURCES: ",".join(map(str, sources))} if sources else {})


def is_same(key: str, old: str | None, new: str | None, saved: Mapping[str, str], present: Mapping[str, str]) -> bool:
    """Whether two paths hold the same content.

    Args:
        saved: the checkpoint's fingerprints. Those of earlier versions have none; the old path is then read, and if it is gone,
            a new path of the same name is accepted.
        present: the fingerprints of this run.
    """
    before, now = saved.get(key), present.get(key)
    if before is None and old != new:
        before = fingerprint(old)
        if before is None and now is not None and old is not None and new is not None:
            return Path(old).name == Path(new).name
    return before == now if before is not None and now is not None else old == new


def other_shape(checkpoint: Path, student: str) -> str | None:
    """How the student's architecture or tokenizer differs from a checkpoint's; None if they agree or the checkpoint has no
    record of them.

    Raises:
        ModelError: the student is not a model.
    """
    kept = checkpoint / MODEL_DIR
    try:
        before = flatten(asdict(read_architecture(kept)))
    except ModelError:
        return None
    now = flatten(asdict(read_architecture(student)))
    differences = [f"{key} {before.get(key)} -> {now.get(key)}" for key in now if before.get(key) != now.get(key)]
    differences = [each for each in differences if not each.startswith("max_positions ")]
    tokenizers = [folder / "tokenizer.json" for folder in (kept, Path(student))]
    if not differences and all(file.is_file() for file in tokenizers):
        first, second = (file.read_bytes() for file in tokenizers)
        differences = ["a different tokenizer.json"] if first != second else []
    return f"{student} is a different student: {', '.join(differences)}" if differences else None
