"""A logger follows `metrics.jsonl` and logs new rows as soon as the service accepts them.

So `metrics.jsonl` stays the source of truth, training never waits, and a service that was unavailable gets what it missed.
`RUN/loggers/NAME.json` holds the id of the service's run and the last step logged; a later start continues from there. Each
step is logged once: if a run returns to an earlier checkpoint, a service that cannot delete steps keeps those it got first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kdrl_mcore.config import LoggingConfig, flatten
from kdrl_mcore.monitoring.loggers.choice import class_of
from kdrl_mcore.monitoring.loggers.interface import FIRST, FOLDER, LoggedRun, Logger
from kdrl_mcore.monitoring.metrics import METRICS_FILE, rows_from
from kdrl_mcore.resilience.files import write_file

RETRY_SECONDS = 300.0
"""Interval between attempts after a service has failed."""


def default_name(run_dir: Path) -> str:
    """The name of a run in the services: the run directory's path below `runs`, or otherwise its last part."""
    parts = run_dir.absolute().parts
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else ()
    return "/".join(below or parts[-1:])


class Follower:
    """Logs the rows of one run's `metrics.jsonl` to one logger. Catches everything that the service raises."""

    def __init__(self, run_dir: Path, name: str, step: int, warn: Callable[[str], None]) -> None:
        """Args:
        step: the step after which the run continues.
        warn: called with one line the first time the service fails.
        """
        self._run_dir, self.name, self._step = run_dir, name, step
        self._warn: Callable[[str], None] | None = warn
        self._logger: Logger | None = None
        self._offset = 0  # into metrics.jsonl: everything before it is logged
        self._first = 0  # the first step to log
        self._failed_at: float | None = None

    def send(self, *, now: bool = False) -> bool:
        """Log the new rows. After a failure nothing is sent for `RETRY_SECONDS`, unless `now`.

        Returns:
            Whether all rows are logged.
        """
        if self._failed_at is not None and not now and time.monotonic() - self._failed_at < RETRY_SECONDS:
            return False
        try:
            self._log_new_rows()
        except Exception as error:  # each service raises its own
            self._fail(error)
        return self._failed_at is None

    def close(self, *, failed: bool) -> bool:
        """Log the remaining rows and close the run; returns whether that succeeded."""
        sent = self.send(now=True)
        if self._logger is not None:
            try:
                self._logger.close(failed=failed)
            except Exception as error:
                self._fail(error)
                sent = False
        return sent

    def _log_new_rows(self) -> None:
        path = self._run_dir / METRICS_FILE
        if self._logger is None:
            self._open()
        assert self._logger is not None
        for row, offset in rows_from(path, self._offset):
            step = int(row["step"])
            if step >= self._first:
                self._logger.log(step, {name: value for name, value in row.items() if name != "step"})
                self._keep(step)
            self._offset = offset
        self._failed_at = None

    def _open(self) -> None:
        kept = self._kept()
        config = read_config(self._run_dir)
        run = LoggedRun(
            project=str(config.get("logging.project") or LoggingConfig().project),
            name=str(config.get("logging.run_name") or default_name(self._run_dir)),
            config=config,
            run_dir=self._run_dir,
            step=self._step,
            run_id=kept.get("run_id"),
        )
        self._logger = class_of(self.name)(run)
        last = self._logger.last_step
        last = int(kept.get("step", FIRST)) if last is None else last
        self._offset, self._first = 0, last + 1
        self._keep(last)

    def _fail(self, error: Exception) -> None:
        """Warn once and close the logger, which is opened again at the next attempt. Training continues."""
        self._failed_at = time.monotonic()
        if self._warn is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._warn(
                f"{self.name} accepts no metrics ({reason}); {METRICS_FILE} has every step: python -m "
                f"kdrl_mcore.monitoring.loggers {self._run_dir} {self.name} sends what is missing later"
            )
            self._warn = None
        if self._logger is not None:
            with suppress(Exception):
                self._logger.close(failed=False)
            self._logger = None

    @property
    def _state(self) -> Path:
        return self._run_dir / FOLDER / f"{self.name.replace(':', '.')}.json"

    def _kept(self) -> dict[str, Any]:
        try:
            known = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _keep(self, step: int) -> None:
        assert self._logger is not None
        if self._logger.run_id is not None or self._logger.last_step is None:
            write_file(self._state, json.dumps({"run_id": self._logger.run_id, "step": step}) + "\n")


def read_config(run_dir: Path) -> Mapping[str, Any]:
    """The flat configuration of a run directory."""
    tree = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    assert isinstance(tree, dict)
    return flatten(tree)
