"""Write checkpoints while training continues.

The order of steps makes an interruption at any moment harmless: take a snapshot, have child processes write it to a temporary
folder (`.step_NNNNNN.partial`) and compute checksums; when those of every rank are done, rank 0 writes the manifest, renames
the folder, moves `latest`, and only then deletes old checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from kdrl_mcore.checkpointing.checkpoint import (
    BEST,
    LATEST,
    MODEL_DIR,
    WEIGHTS_DIR,
    checkpoint_dirs,
    in_lineage,
    set_link,
    step_of,
)
from kdrl_mcore.checkpointing.lineage import lineage_of
from kdrl_mcore.checkpointing.manifest import checksum, first_missing, sync_directory, write_durably, write_manifest
from kdrl_mcore.convert.convert import write_kept
from kdrl_mcore.convert.folders import STATE_FILE
from kdrl_mcore.convert.hf_files import KEPT, copy_side_files
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.collect import gather_objects
from kdrl_mcore.resilience.interrupt import (
    children_ignore_stop_signals,
    end_with_parent,
    let_threads_finish,
    start_resource_tracker,
)
from kdrl_mcore.student.student import Student

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run into `directory`, one at a time. Its methods are collective over the world."""

    def __init__(self, directory: Path, keep: int, *, asynchronous: bool) -> None:
        """Args:
        keep: how many of the newest intact checkpoints to keep; 0 keeps all.
        asynchronous: `save` returns when the snapshot is taken, rather than when the checkpoint is complete.
        """
        self._directory = directory
        self._keep = keep
        self._asynchronous = asynchronous
        self._queue = AsyncCallsQueue(persistent=False)
        self._strategy: Any = None  # Megatron-Core's, from the first save on
        self._step: int | None = None  # of the checkpoint that is being written
        self._errors: list[Exception] = []  # from files that Megatron-Core writes on rank 0 only
        if dist.get_rank() == 0 and directory.is_dir():
            for left_over in directory.glob(".step_*"):
                shutil.rmtree(left_over, ignore_errors=True)

    def save(self, step: int, student: Student, state: dict[str, Any], *, is_best: bool = False, prunes: bool = True) -> None:
        """Begin the checkpoint of `step`, after completing the previous one.

        Args:
            state: everything other than weights and optimizer, as JSON values.
            is_best: whether the link `best` moves to it.
            prunes: whether old checkpoints are deleted when it is complete.

        Raises:
            CheckpointError: this checkpoint or the previous one could not be written; earlier ones are unchanged.
        """
        self.finish()
        self._step = step
        folder = self._temporary(step)
        if self._strategy is None:
            self._strategy = mcore.parallel_save_strategy(student.groups.replicas)
        self._on_rank_0(partial(_prepare, folder, Path(student.source), state))
        start_resource_tracker()
        with children_ignore_stop_signals():  # the writing processes must survive the signal that asks for a last checkpoint
            try:
                mcore.new_write_results_queue()
                state_dict = student.sharded_state(loading=False)
                common = mcore.common_state(state_dict)
                with mcore.rank_0_write_errors() as errors:
                    request = dist_checkpointing.save(
                        state_dict, str(folder / WEIGHTS_DIR), self._strategy, async_sharded_save=True, **mcore.save_settings()
                    )
                self._on_rank_0(partial(_raise_first, errors))
                self._on_rank_0(partial(mcore.write_common_state, common, folder / WEIGHTS_DIR))
                assert request is not None
                if request.async_fn is not None:
                    request = request._replace(async_fn=partial(_write_and_checksum, request.async_fn, folder, os.getpid()))
                request.add_finalize_fn(partial(self._publish, step, is_best, prunes))
                let_threads_finish()
                self._queue.schedule_async_request(request)  # copies tensors on the GPU before it returns
                student.leave_state()
            except OSError as error:
                raise self._failure(str(error)) from error
        if not self._asynchronous:
            self.finish()

    @property
    def latest(self) -> Path | None:
        """The last complete checkpoint."""
        link = self._directory / LATEST
        return self._directory / link.readlink() if link.is_symlink() else None

    def poll(self) -> None:
        """Complete the checkpoint being written if all ranks have written their part. Raises as `save` does."""
        if self._step is not None:
            self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the checkpoint being written, and complete it. Raises as `save` does."""
        if self._step is not None:
            self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        try:
            with mcore.rank_0_write_errors() as self._errors:
                finalized = self._queue.maybe_finalize_async_calls(blocking=blocking)
            if finalized:
                self._step = None
        except (CheckpointException, OSError) as error:
            raise self._failure(_causes(error)) from error

    def _publish(self, step: int, is_best: bool, prunes: bool) -> None:
        """Publish a checkpoint whose files are written. Collective over the world."""
        self._on_rank_0(partial(_raise_first, self._errors))
        temporary, target = self._temporary(step), self._directory / f"step_{step:06d}"
        own = temporary / _sums_file(dist.get_rank())
        gathered = gather_objects(json.loads(own.read_text()) if own.is_file() else {})

        def complete() -> None:
            for path in temporary.glob(_sums_file("*")):
                path.unlink()
            write_manifest(temporary, {name: entry for sums in gathered for name, entry in sums.items()})
            for folder in (temporary / WEIGHTS_DIR, temporary / MODEL_DIR, temporary):
                sync_directory(folder)
            replaced = self._directory / f".{target.name}.replaced"
            if target.exists():
                os.replace(target, replaced)
            os.replace(temporary, target)
            for name in (LATEST, *([BEST] if is_best else [])):
                set_link(self._directory / name, target.name)
            sync_directory(self._directory)
            shutil.rmtree(replaced, ignore_errors=True)
            if prunes:
                self._delete_old(target)

        self._on_rank_0(complete)

    def _delete_old(self, newest: Path) -> None:
        """Keep the newest `keep` intact checkpoints of this lineage up to `newest`, any damaged ones in between, and always
        `newest` and the best. Delete the rest up to `newest`, including those of branches that were left."""
        if self._keep <= 0:
            return
        lineage, whole = lineage_of(newest), 0
        link = self._directory / BEST
        best = self._directory / link.readlink() if link.is_symlink() else None
        for path in reversed([path for path in checkpoint_dirs(self._directory) if step_of(path) <= step_of(newest)]):
            if path == best:
                continue
            if path != newest and (whole >= self._keep or not in_lineage(path, lineage)):
                shutil.rmtree(path, ignore_errors=True)
            elif first_missing(path) is None:
                whole += 1

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Run an action on the file system on rank 0; all ranks raise if it fails. Collective over the world."""
        message: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except (OSError, RuntimeError) as error:
                message = [" ".join(str(error).split())]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise self._failure(message[0])

    def _temporary(self, step: int) -> Path:
        return self._directory / f".step_{step:06d}.partial"

    def _failure(self, cause: str) -> CheckpointError:
        step, self._step = self._step, None
        assert step is not None
        if dist.get_rank() == 0:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        last = f"the last checkpoint, {self.latest.name}, is intact" if self.latest else "there is no checkpoint yet"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {cause}; {last}: free disk space or "
            "repair the file system, then start the same command again"
        )


def _prepare(temporary: Path, source: Path, state: dict[str, Any]) -> None:
    temporary.parent.mkdir(exist_ok=True)  # not its parents: a run directory that vanished must not come back on another disk
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    (temporary / WEIGHTS_DIR).mkdir()
    copy_model(source, temporary / MODEL_DIR)
    write_durably(temporary / STATE_FILE, json.dumps(state, indent=2) + "\n")


def copy_model(source: Path, target: Path) -> None:
    """Make a folder of what a checkpoint holds of a model besides its weights: config, tokenizer, and the tensors that are
    in none of its layers.

    Raises:
        ModelError: the model folder is damaged.
    """
    target.mkdir()
    copy_side_files(source, target)
    if (target / "config.json").is_file():
        write_kept(source, target / KEPT)


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]


def _write_and_checksum(write: Callable[..., None], temporary: Path, parent: int, rank: int, *args: Any, **kwargs: Any) -> None:
    """In a child process: run Megatron-Core's writer, then compute the checksums of the files it wrote. It ends with `parent`,
    the rank: nobody would complete the checkpoint, and it would print a traceback after the run's last line."""
    end_with_parent(parent)
    write(rank, *args, **kwargs)
    sums = checksum(temporary, sorted((temporary / WEIGHTS_DIR).glob(f"__{rank}_*")))
    write_durably(temporary / _sums_file(rank), json.dumps(sums))


def _sums_file(rank: int | str) -> str:
    return f".sums_{rank}.json"


def _causes(error: BaseException) -> str:
    """One line with the reason why each rank's writer failed."""
    failures = getattr(error, "failures", None)
    if not failures:
        return " ".join(str(error).split())
    causes = [f"rank {rank}: {' '.join(str(wrapped[0]).split())}" for rank, wrapped in sorted(failures.items())]
    return "; ".join(causes)
