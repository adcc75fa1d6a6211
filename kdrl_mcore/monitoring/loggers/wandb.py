"""Weights & Biases. `WANDB_MODE=offline` writes to `RUN/loggers/wandb`, which `wandb sync` uploads."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl_mcore.monitoring.loggers.interface import FIRST, LoggedRun


class WandbLogger:
    """A W&B run. W&B keeps the values with which a step was first logged. Offline it does not report which steps it has, so the
    folder of each start holds the whole run."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            settings=wandb.Settings(console="off"),
        )
        self.run_id: str | None = self._run.id
        self.last_step: int | None = self._run.step - 1 if self._run.resumed and not self._run.offline else FIRST

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the step's metrics; W&B sends them in the background."""
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=int(failed))
