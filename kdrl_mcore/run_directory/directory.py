"""A run's directory while the run is alive: its lock, and the record of where the run begins and what it exported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from kdrl_mcore.checkpointing.checkpoint import BEST, LATEST, candidates_in, in_lineage, set_link
from kdrl_mcore.checkpointing.lineage import Lineage, lineage_of
from kdrl_mcore.config import Config, save_config
from kdrl_mcore.parallel.collect import on_first_rank
from kdrl_mcore.run_directory.branches import LEFT, begin_branch, drop_after
from kdrl_mcore.run_directory.export import set_aside
from kdrl_mcore.run_directory.lock import RunLock
from kdrl_mcore.run_directory.record import Record, describe_start, read_record
from kdrl_mcore.run_directory.start import CONFIG_FILE, Start

logger = logging.getLogger(__name__)


class RunDirectory:
    """`run.dir` while the run is alive. A context manager, collective over the world: rank 0 holds the lock."""

    def __init__(self, config: Config, overrides: Sequence[str], hub: Mapping[str, str] | None = None) -> None:
        """Args:
        overrides: the command line's overrides, for the record.
        hub: models and data of the Hugging Face hub by key, `org/name@commit`, for the record.
        """
        self.path = Path(config.run.dir)
        self._config, self._overrides, self._hub = config, overrides, dict(hub or {})
        self._lock = RunLock(self.path)
        self._held = ExitStack()
        self._record = Record()

    def __enter__(self) -> RunDirectory:
        """Take the lock.

        Raises:
            StorageError: on every rank, if another run holds it or the directory cannot be written.
        """
        on_first_rank(self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def _take(self) -> None:
        self._held.enter_context(self._lock)

    def check(self) -> None:
        """Check that this run still holds the directory. For rank 0.

        Raises:
            StorageError: another run has taken it over.
        """
        self._lock.check()

    def begin(self, start: Start) -> None:
        """Record this start, and change to its branch. For rank 0, once everything that can fail is built."""
        self._record = record = read_record(self.path)
        current = record.lineage or self._latest_lineage()
        self.path.mkdir(parents=True, exist_ok=True)
        if self._config.checkpoint.export_hf and (kept := set_aside(self.path)) is not None:
            logger.info("%s/hf was copied, changed, or written by an earlier version, so it is kept as %s", self.path, kept)
        if start.lineage.branch != current.branch:
            source, shared = start.source, None
            if source is not None:
                shared = current.shared(source, start.step)
            if begin_branch(self.path, current.branch, shared, source.branch if source else None, start.step):
                logger.info("the steps that this run leaves are kept in %s", self.path / LEFT / (current.branch or "first"))
            self._point_at(start)
            record.origin = None if start.checkpoint is None else str(start.checkpoint)
        else:
            drop_after(self.path, start.step)
        record.lineage = start.lineage
        record.starts.append(
            {
                **describe_start(self._overrides, dist.get_world_size()),
                "resumed_from": None if start.checkpoint is None else str(start.checkpoint),
                "step": start.step,
                "branch": start.lineage.branch,
                "changes": start.changes,
                "hub": self._hub,
            }
        )
        record.write(self.path)
        save_config(self._config, self.path / CONFIG_FILE)

    def exported(self, start: Start, step: int) -> None:
        """Record that `RUN/hf` holds the student after `step`. For rank 0."""
        self._record.exported = (start.lineage.branch, step)
        self._record.write(self.path)

    def _latest_lineage(self) -> Lineage:
        """The newest checkpoint's lineage, for a directory without a record."""
        newest = candidates_in(self.path / "checkpoints")[:1]
        return (lineage_of(newest[0]) if newest else None) or Lineage()

    def _point_at(self, start: Start) -> None:
        """Make `latest` name the checkpoint that the run resumes from, until the new branch has its own; `best` names none of a
        branch that was left."""
        latest, best = (self.path / "checkpoints" / name for name in (LATEST, BEST))
        if best.is_symlink() and not in_lineage(best.parent / best.readlink(), start.lineage):
            best.unlink()
        has_checkpoint = start.source is not None and start.checkpoint is not None
        set_link(latest, start.checkpoint.name if has_checkpoint and start.checkpoint is not None else None)
