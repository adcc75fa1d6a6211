"""trackio: on this machine (`trackio show`), in the Space named by `TRACKIO_SPACE_ID`, or on the server at
`TRACKIO_SERVER_URL`."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl_mcore.monitoring.loggers.interface import FIRST, LoggedRun


class TrackioLogger:
    """A trackio run. trackio keeps every value of a step, so none is logged twice."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        self._run = trackio.init(
            run.project,
            name=run.name,
            config=dict(run.config),
            resume="never" if run.run_id is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if run.run_id is not None:  # trackio finds runs by name, and another run may have the same name
            self._run.id = run.run_id
        self.run_id: str | None = self._run.id
        self.last_step: int | None = FIRST if run.run_id is None else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the step's metrics; trackio writes or sends them in the background."""
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until all is written or sent."""
        self._run.finish()
