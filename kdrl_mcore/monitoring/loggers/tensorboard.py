"""TensorBoard: event files in `RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl_mcore.monitoring.loggers.interface import FIRST, LoggedRun


class TensorBoardLogger:
    """Event files of a run. Steps after the one from which the run continues are purged, so that TensorBoard shows each step
    once, with its latest values."""

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.run_dir / "tensorboard"
        self.run_id: str | None = None
        self.last_step: int | None = run.step if folder.exists() and run.step else FIRST
        self._writer = SummaryWriter(str(folder), purge_step=self.last_step + 1 if folder.exists() else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()
