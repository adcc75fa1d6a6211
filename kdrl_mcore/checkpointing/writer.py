"""Writing checkpoints while training goes on.

The order that makes an interruption at any moment harmless: a snapshot is taken, child processes write it aside
(`.step_NNNNNN.partial`) and checksum it, and when every rank's are done, rank 0 writes the manifest, renames the folder,
moves `latest`, and only then deletes what is too old.
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

from kdrl_mcore.checkpointing.checkpoint import LATEST, MODEL_DIR, STATE_FILE, WEIGHTS_DIR, checkpoint_dirs, step_of
from kdrl_mcore.checkpointing.manifest import checksum, first_missing, sync_directory, write_durably, write_manifest
from kdrl_mcore.convert.hf_files import copy_side_files
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.interrupt import children_ignore_stop_signals
from kdrl_mcore.parallel import mcore
from kdrl_mcore.student import Student

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """The checkpoints of one run's student, in `directory`. One is written at a time. Methods are collective over the world."""

    def __init__(self, directory: Path, keep: int, *, asynchronous: bool) -> None:
        """Args:
        keep: the newest whole checkpoints that stay; 0 keeps all.
        asynchronous: `save` returns when the snapshot is taken; else when the checkpoint is complete.
        """
        self._directory = directory
        self._keep = keep
        self._asynchronous = asynchronous
        self._queue = AsyncCallsQueue(persistent=False)
        self._strategy: Any = None  # Megatron-Core's, from the first save on
        self._step: int | None = None  # of the checkpoint that is being written
        self._errors: list[Exception] = []  # of what Megatron-Core writes on rank 0 alone
        if dist.get_rank() == 0 and directory.is_dir():
            for left_over in directory.glob(".step_*"):
                shutil.rmtree(left_over, ignore_errors=True)

    def save(self, step: int, student: Student, state: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`, after completing the one before.

        Args:
            state: everything beside weights and optimizer, as JSON values.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written; those before are as they were.
        """
        self.finish()
        self._step = step
        aside = self._aside(step)
        if self._strategy is None:
            self._strategy = mcore.parallel_save_strategy(student.groups.replicas)
        self._on_rank_0(partial(_prepare, aside, Path(student.source), state))
        with children_ignore_stop_signals():  # the writer's processes must outlive the signal that asks for a last checkpoint
            try:
                mcore.start_write_results_process()
                state_dict = student.sharded_state(loading=False)
                with mcore.rank_0_write_errors() as errors:
                    request = dist_checkpointing.save(
                        state_dict, str(aside / WEIGHTS_DIR), self._strategy, async_sharded_save=True, **mcore.save_settings()
                    )
                self._on_rank_0(partial(_raise_first, errors))
                assert request is not None
                if request.async_fn is not None:
                    request = request._replace(async_fn=partial(_write_and_checksum, request.async_fn, aside))
                request.add_finalize_fn(partial(self._publish, step))
                self._queue.schedule_async_request(request)  # which copies what is on a GPU before it returns
                student.leave_state()
            except OSError as error:
                raise self._failure(str(error)) from error
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint that is being written if all ranks have written their part. Raises as `save` does."""
        if self._step is not None:
            self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and complete it. Raises as `save` does."""
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

    def _publish(self, step: int) -> None:
        """The checkpoint's files are written: make it count. Collective."""
        self._on_rank_0(partial(_raise_first, self._errors))
        aside, target = self._aside(step), self._directory / f"step_{step:06d}"
        own = aside / _sums_file(dist.get_rank())
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, json.loads(own.read_text()) if own.is_file() else {})

        def complete() -> None:
            for path in aside.glob(_sums_file("*")):
                path.unlink()
            write_manifest(aside, {name: entry for sums in gathered for name, entry in sums.items()})
            for folder in (aside / WEIGHTS_DIR, aside / MODEL_DIR, aside):
                sync_directory(folder)
            replaced = self._directory / f".{target.name}.replaced"
            if target.exists():
                os.replace(target, replaced)
            os.replace(aside, target)
            link = self._directory / f".{LATEST}.new"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            os.replace(link, self._directory / LATEST)
            sync_directory(self._directory)
            shutil.rmtree(replaced, ignore_errors=True)
            self._delete_old(target)

        self._on_rank_0(complete)

    def _delete_old(self, newest: Path) -> None:
        """Keep the newest `keep` whole checkpoints up to `newest`, and whatever is newer than the last of these."""
        if not self._keep:
            return
        whole = 0
        for path in reversed([path for path in checkpoint_dirs(self._directory) if step_of(path) <= step_of(newest)]):
            if whole >= self._keep:
                shutil.rmtree(path, ignore_errors=True)
            elif first_missing(path) is None:
                whole += 1

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Run on rank 0 what touches the file system; all ranks raise if it fails."""
        message: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except (OSError, RuntimeError) as error:
                message = [" ".join(str(error).split())]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise self._failure(message[0])

    def _aside(self, step: int) -> Path:
        return self._directory / f".step_{step:06d}.partial"

    def _failure(self, cause: str) -> CheckpointError:
        step, self._step = self._step, None
        assert step is not None
        if dist.get_rank() == 0:
            shutil.rmtree(self._aside(step), ignore_errors=True)
        latest = self._directory / LATEST
        last = f"the last checkpoint, {latest.readlink()}, is whole" if latest.is_symlink() else "there is no checkpoint yet"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {cause}; {last}: make room or mend "
            "the file system, then start the same command again"
        )


def _prepare(aside: Path, source: Path, state: dict[str, Any]) -> None:
    aside.parent.mkdir(exist_ok=True)  # not its parents: a run directory that vanished must not come back on another disk
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    (aside / WEIGHTS_DIR).mkdir()
    (aside / MODEL_DIR).mkdir()
    copy_side_files(source, aside / MODEL_DIR)
    write_durably(aside / STATE_FILE, json.dumps(state, indent=2) + "\n")


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]


def _write_and_checksum(write: Callable[..., None], aside: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """In a child process: what Megatron-Core's writer does, then the checksums of the files it wrote."""
    write(rank, *args, **kwargs)
    sums = checksum(aside, sorted((aside / WEIGHTS_DIR).glob(f"__{rank}_*")))
    write_durably(aside / _sums_file(rank), json.dumps(sums))


def _sums_file(rank: int | str) -> str:
    return f".sums_{rank}.json"


def _causes(error: BaseException) -> str:
    """One line: why each rank's writer failed."""
    failures = getattr(error, "failures", None)
    if not failures:
        return " ".join(str(error).split())
    causes = [f"rank {rank}: {' '.join(str(wrapped[0]).split())}" for rank, wrapped in sorted(failures.items())]
    return "; ".join(causes)
