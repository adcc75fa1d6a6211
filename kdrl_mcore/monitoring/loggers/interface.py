"""The interface of a logger: it opens a run, logs the metrics of steps, and closes the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FIRST = -1
"""`Logger.last_step` of a run that has no step yet. The evaluation before training is step 0."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger opens.

    Attributes:
        project: the project, which groups runs to compare.
        name: the display name of the run.
        config: the whole configuration, flat (`group.key: value`).
        run_dir: the run directory.
        step: the step after which the run continues; 0 for a new run.
        run_id: the service's id of the run to continue; None to begin a new one.
    """

    project: str
    name: str
    config: Mapping[str, Any]
    run_dir: Path
    step: int
    run_id: str | None

    @property
    def folder(self) -> Path:
        """The folder for the files of loggers. It belongs to one branch of the run."""
        return self.run_dir / FOLDER


class Logger(Protocol):
    """An open run of one service. Its class is called with a `LoggedRun`; every method may raise any error of the service.

    Attributes:
        run_id: the id with which a later start continues this run; None if the service needs none.
        last_step: the last step that the service has; all later ones are logged, including those of an earlier start. `FIRST`
            for a new run; None if the service does not report it, in which case the last step logged from here counts.
    """

    run_id: str | None
    last_step: int | None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step; values may be NaN or infinite. Steps come in ascending order."""
        ...

    def close(self, *, failed: bool) -> None:
        """Send the remaining metrics and close the run.

        Args:
            failed: the training ended with an error, or was killed.
        """
        ...


FOLDER = "loggers"
"""Name of the loggers' folder in the run directory."""
