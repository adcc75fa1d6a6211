"""Training checkpoints: Megatron's torch_dist format for weights and optimizer, JSON for the rest; loadable in any layout.

There is no random state to save: every draw (data order, sampling, evaluation) is a function of the seed, the step and the
sample, and the models have no dropout. `writer.py` writes them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from kdrl_mcore.checkpointing.lineage import Lineage, lineage_of
from kdrl_mcore.checkpointing.manifest import find_damage
from kdrl_mcore.convert.folders import STATE_FILE
from kdrl_mcore.convert.torch_dist import read_metadata
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.collect import any_rank, on_first_rank
from kdrl_mcore.parallel.optimizer_state import OPTIMIZER_TENSORS, as_saved
from kdrl_mcore.student.student import Student

WEIGHTS_DIR = "weights"
MODEL_DIR = "model"  # the HF config and tokenizer, so that a checkpoint can be exported without the model it came from
LATEST = "latest"
BEST = "best"
"""Link to the checkpoint of the best evaluation (`checkpoint.best`), which is not deleted as long as no evaluation is
better."""

logger = logging.getLogger(__name__)


def find_checkpoint(directory: Path, resume: str, lineage: Lineage | None = None, origin: str | None = None) -> Path | None:
    """The checkpoint to resume from, the same on every rank; None to begin with the first step. Collective over the world: the
    candidates' checksums are verified.

    A damaged or incomplete checkpoint is named in a warning, and the one before it is tried.

    Args:
        resume: `auto` (the run's latest intact checkpoint, if any), `never`, or a path.
        lineage: for `auto`, the checkpoints that belong to the run's past; None allows all up to the latest. Rank 0's counts.
        origin: for `auto`, the checkpoint that the current branch began from, used if the branch has none. Rank 0's counts.

    Raises:
        CheckpointError: the given path is not an intact checkpoint, or the run has checkpoints but none is intact.
    """
    if resume == "never":
        return None
    if resume != "auto":
        _check_is_one(Path(resume))
        damage = find_damage(Path(resume))
        if damage:
            raise CheckpointError(f"{damage}; name another checkpoint with checkpoint.resume")
        return Path(resume).resolve()
    found = on_first_rank(lambda: [str(path) for path in candidates_in(directory, lineage)] or ([origin] if origin else []))
    candidates = [Path(path) for path in found]
    for path in candidates:
        damage = find_damage(path)
        if damage is None:
            return path
        if dist.get_rank() == 0:
            logger.warning("checkpoint refused: %s; trying the one before it", damage)
    if candidates:
        if candidates[0].parent != directory:
            raise CheckpointError(
                f"this run began from {candidates[0]}, which is no longer intact: restore it, name another one with "
                "checkpoint.resume, or start over with checkpoint.resume=never"
            )
        raise CheckpointError(
            f"no checkpoint in {directory} is intact ({len(candidates)} refused): restore one, or start over with "
            "checkpoint.resume=never"
        )
    return None


def _check_is_one(path: Path) -> None:
    """Raise CheckpointError if the path that a user named does not exist, or is a folder of checkpoints."""
    if not path.exists():
        raise CheckpointError(f"checkpoint.resume={path} does not exist: it is auto, never or the path of a checkpoint")
    for folder in (path, path / "checkpoints"):
        if candidates := candidates_in(folder):
            raise CheckpointError(f"checkpoint.resume={path} holds checkpoints: name one of them, such as {candidates[0]}")


def load_checkpoint(path: Path, student: Student) -> dict[str, Any]:
    """Load weights and optimizer into a student of any layout, and return the rest of the state. Collective over the world.

    Raises:
        CheckpointError: the checkpoint does not fit the model, cannot be read, or holds weights that are not finite.
    """
    state = student.sharded_state(loading=True)
    saved = read_metadata(path / WEIGHTS_DIR).state_dict_metadata
    try:
        state[OPTIMIZER_TENSORS] = as_saved(state[OPTIMIZER_TENSORS], saved, float32_weights=student.is_float32)
    except KeyError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error.args[0]}, which this run's optimizer needs") from error
    student.load_sharded_state(_load(path, state))
    student.leave_state()
    if any_rank(not student.weights_are_finite()):
        raise CheckpointError(f"{path} holds weights that are NaN or infinite: name an earlier one with checkpoint.resume")
    return json.loads((path / STATE_FILE).read_text())


def load_weights(path: Path, parts: ModelParts) -> None:
    """Load only a checkpoint's model weights into `parts`, of any layout. Collective over the world."""
    state = {f"model{index}": mcore.weights_to_load(chunk) for index, chunk in enumerate(parts.chunks)}
    loaded = _load(path, state)
    for index, chunk in enumerate(parts.chunks):
        mcore.take_weights(chunk, loaded[f"model{index}"])


def checkpoint_dirs(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, intact or not."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if re.fullmatch(r"step_\d{6,}", path.name)), key=step_of)


def set_link(link: Path, target: str | None) -> None:
    """Make `latest` or `best` name another checkpoint, or none. If a folder is in its place, as in a copy that followed links,
    it moves to `NAME_copy_N`."""
    if link.is_dir() and not link.is_symlink():
        os.replace(link, next(path for n in count(1) if not (path := link.with_name(f"{link.name}_copy_{n}")).exists()))
    if target is None:
        link.unlink(missing_ok=True)
        return
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name.removeprefix("step_"))


def candidates_in(directory: Path, lineage: Lineage | None = None) -> list[Path]:
    """The lineage's checkpoints, newest first: the one that `latest` points to, then those before it. Later ones were never
    published, or belong to a branch that was left."""
    steps = checkpoint_dirs(directory)
    latest = directory / LATEST
    if latest.is_symlink() and (pointed := directory / latest.readlink().name) in steps:
        steps = steps[: steps.index(pointed) + 1]
    return [path for path in reversed(steps) if in_lineage(path, lineage)]


def in_lineage(checkpoint: Path, lineage: Lineage | None) -> bool:
    """Whether a checkpoint belongs to this lineage. An unreadable one does, so that it is refused by name when it is tried."""
    own = lineage_of(checkpoint) if lineage is not None else None
    return lineage is None or own is None or lineage.has(own.branch, step_of(checkpoint))


def _load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    reason = mcore.why_unreadable(path / WEIGHTS_DIR)
    if reason is not None:
        raise CheckpointError(f"{path} cannot be loaded: {reason}")
    try:
        return dist_checkpointing.load(state, str(path / WEIGHTS_DIR))
    except torch.OutOfMemoryError:
        raise
    except (CheckpointingException, CheckpointException, KeyError, RuntimeError, OSError) as error:
        # torch collects the failures of all ranks, each with its stack; the last line is the error.
        cause = str(error).strip().splitlines()[-1] if isinstance(error, CheckpointException) else str(error)
        raise CheckpointError(f"{path} cannot be loaded: {' '.join(cause.split())[:300]}") from error
