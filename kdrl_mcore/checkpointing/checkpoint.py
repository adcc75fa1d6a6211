"""Training checkpoints: Megatron's torch_dist format for weights and optimizer, JSON for the rest; loadable in any layout.

There is no random state to save: every draw (data order, sampling, evaluation) is a function of the seed, the step and the
sample, and the models have no dropout. A checkpoint is written aside and renamed when complete; `latest` moves after that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from kdrl_mcore.convert.hf_files import copy_side_files
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.student import Student

STATE_FILE = "trainer_state.json"
MODEL_DIR = "model"  # the HF config and tokenizer, so that a checkpoint can be exported without the model it came from
LATEST = "latest"


def save_checkpoint(directory: Path, step: int, student: Student, state: dict[str, Any], keep: int) -> Path:
    """Write `directory/step_NNNNNN`, point `latest` at it, and delete all but the newest `keep` (0 keeps all). Collective
    over the world.

    Args:
        state: everything beside weights and optimizer, as JSON values.
    """
    target = directory / f"step_{step:06d}"
    aside = directory / f".{target.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "weights").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(student.sharded_state(loading=False), str(aside / "weights"))
    if dist.get_rank() == 0:
        (aside / MODEL_DIR).mkdir()
        copy_side_files(Path(student.source), aside / MODEL_DIR)
        (aside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        link = directory / f".{LATEST}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, directory / LATEST)
        for old in _steps(directory)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()
    return target


def find_checkpoint(directory: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: `auto` (the run's latest, if any), `never`, or a path.

    Raises:
        CheckpointError: a path that is not a complete checkpoint.
    """
    if resume == "never":
        return None
    path = directory / LATEST if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {STATE_FILE}; name another with checkpoint.resume"
        )
    return path.resolve()


def load_checkpoint(path: Path, student: Student) -> dict[str, Any]:
    """Load weights and optimizer into the student, in whatever layout it has, and return the rest of the state. Collective
    over the world.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    loaded = _load(path, student.sharded_state(loading=True))
    student.load_sharded_state(loaded)
    return json.loads((path / STATE_FILE).read_text())


def load_weights(path: Path, parts: ModelParts) -> None:
    """Load only the model's weights of a checkpoint, in whatever layout `parts` has. Collective over the world."""
    state = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(parts.chunks)}
    loaded = _load(path, state)
    for index, chunk in enumerate(parts.chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)


def _load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path / "weights"))
    except (CheckpointingException, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _steps(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step_\d{6,}", path.name))
