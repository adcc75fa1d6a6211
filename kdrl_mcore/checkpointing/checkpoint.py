"""Training checkpoints: Megatron's torch_dist format for weights and optimizer, JSON for the rest; loadable in any layout.

There is no random state to save: every draw (data order, sampling, evaluation) is a function of the seed, the step and the
sample, and the models have no dropout. How they are written: `writer.py`.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from kdrl_mcore.checkpointing.manifest import find_damage
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.parallel import mcore
from kdrl_mcore.student import Student

STATE_FILE = "trainer_state.json"
WEIGHTS_DIR = "weights"
MODEL_DIR = "model"  # the HF config and tokenizer, so that a checkpoint can be exported without the model it came from
LATEST = "latest"

logger = logging.getLogger(__name__)


def find_checkpoint(directory: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: `auto` (the run's latest that is whole, if there is any), `never`, or a path. The same
    on every rank. Collective over the world: the candidates' checksums are verified.

    A damaged or incomplete checkpoint is named in a warning, and the one before it is tried.

    Raises:
        CheckpointError: the path given is not a whole checkpoint, or the run has checkpoints but none that is whole.
    """
    if resume == "never":
        return None
    if resume != "auto":
        damage = find_damage(Path(resume))
        if damage:
            raise CheckpointError(f"{damage}; name another checkpoint with checkpoint.resume")
        return Path(resume).resolve()
    shared: list[list[str] | None] = [[str(path) for path in _candidates(directory)] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    candidates = [Path(path) for path in shared[0] or []]
    for path in candidates:
        damage = find_damage(path)
        if damage is None:
            return path
        if dist.get_rank() == 0:
            logger.warning("checkpoint refused: %s; trying the one before it", damage)
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole ({len(candidates)} refused): restore one, or start anew with "
            "checkpoint.resume=never"
        )
    return None


def load_checkpoint(path: Path, student: Student) -> dict[str, Any]:
    """Load weights and optimizer into the student, in whatever layout it has, and return the rest of the state. Collective
    over the world.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    loaded = _load(path, student.sharded_state(loading=True))
    student.load_sharded_state(loaded)
    student.leave_state()
    return json.loads((path / STATE_FILE).read_text())


def load_weights(path: Path, parts: ModelParts) -> None:
    """Load only the model's weights of a checkpoint, in whatever layout `parts` has. Collective over the world."""
    state = {f"model{index}": mcore.weights_to_load(chunk) for index, chunk in enumerate(parts.chunks)}
    loaded = _load(path, state)
    for index, chunk in enumerate(parts.chunks):
        mcore.take_weights(chunk, loaded[f"model{index}"])


def checkpoint_dirs(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if re.fullmatch(r"step_\d{6,}", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step a checkpoint was made after."""
    return int(path.name.removeprefix("step_"))


def _candidates(directory: Path) -> list[Path]:
    """Where `latest` points, then the ones before it, newest first. Later ones are of a branch that was left (a run that
    went on from an earlier checkpoint) or were not yet announced."""
    steps = checkpoint_dirs(directory)
    latest = directory / LATEST
    if latest.is_symlink() and (pointed := directory / latest.readlink().name) in steps:
        steps = steps[: steps.index(pointed) + 1]
    return steps[::-1]


def _load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path / WEIGHTS_DIR))
    except torch.OutOfMemoryError:
        raise
    except (CheckpointingException, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
