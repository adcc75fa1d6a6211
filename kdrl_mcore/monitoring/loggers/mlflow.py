"""MLflow (mlflow-skinny suffices). `MLFLOW_TRACKING_URI` names the server; the default is a store in `RUN/loggers/mlflow`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_mcore.monitoring.loggers.interface import FIRST, LoggedRun

PARAMS_PER_BATCH = 100
"""The most that MLflow accepts in one request."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


class MlflowLogger:
    """A run of the experiment named after the project. MLflow keeps every value of a step, so none is logged twice. The run's
    parameters are the configuration with which it began."""

    def __init__(self, run: LoggedRun) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlflow").absolute().as_uri()
        if "://" not in uri or uri.startswith("file:"):  # MLflow 3 creates new runs in files only with this setting
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        found = None if run.run_id is None else self._find(run.run_id)
        if found is None:
            found = self._begin(run)
            self.last_step: int | None = FIRST
        else:
            self._client.update_run(found, status="RUNNING")
            self.last_step = None
        self.run_id: str | None = found
        self._id = found

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the step's metrics in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name_of(name), value, now, step) for name, value in metrics.items()])

    def close(self, *, failed: bool) -> None:
        """Set the run's final status."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _find(self, run_id: str) -> str | None:
        """The run's id, or None if the run was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            known = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id if known.info.lifecycle_stage == "active" else None

    def _begin(self, run: LoggedRun) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        begun = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params: Sequence[Any] = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), PARAMS_PER_BATCH):
            self._client.log_batch(begun, params=params[first : first + PARAMS_PER_BATCH])
        return begun


def name_of(metric: str) -> str:
    """A metric's name in the characters that MLflow accepts: `eval/pass@4` becomes `eval/pass_at_4`."""
    return _NOT_IN_NAMES.sub("_", metric.replace("@", "_at_"))
