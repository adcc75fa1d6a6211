"""What went wrong in a run: each kind of fault with its first and last step, and how often it occurred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdrl_mcore.monitoring.alerts import DEFAULT_THRESHOLDS, AlertThresholds, GrowingHistory, check_alerts
from kdrl_mcore.studies.summary import Rows


@dataclass(frozen=True)
class Shown:
    """A fault of a run.

    Attributes:
        name: an alert of the run (`monitoring.alerts`), "updates skipped" or "not finite".
        first, last, count: the first and the last step with the fault, and the number of such steps.
        message: the message at its first occurrence.
    """

    name: str
    first: int
    last: int
    count: int
    message: str


def faults_of(rows: Rows, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> list[Shown]:
    """All faults of a run, ordered by the step of their first occurrence."""
    found = [*_alerts(rows, thresholds), *_skipped_updates(rows), *_not_finite(rows)]
    return sorted(found, key=lambda each: each.first)


def _alerts(rows: Rows, thresholds: AlertThresholds) -> list[Shown]:
    steps: dict[str, list[int]] = {}
    messages: dict[str, str] = {}
    history = GrowingHistory(thresholds.window)
    for row in rows:
        history.append(row)
        for alert in check_alerts(history, thresholds):
            steps.setdefault(alert.name, []).append(int(row["step"]))
            messages.setdefault(alert.name, alert.message)
    return [_shown(name.replace("_", " "), at, messages[name]) for name, at in steps.items()]


def _skipped_updates(rows: Rows) -> list[Shown]:
    skipped = {int(row["step"]): int(row["skipped_updates"]) for row in rows if row.get("skipped_updates", 0.0) > 0}
    message = f"{sum(skipped.values())} updates: a loss, gradient or log-prob was NaN or infinite; the weights did not change"
    return [_shown("updates skipped", list(skipped), message)] if skipped else []


def _not_finite(rows: Rows) -> list[Shown]:
    steps, names = list[int](), dict[str, None]()
    for row in rows:
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            steps.append(int(row["step"]))
            names.update(dict.fromkeys(bad))
    message = f"NaN or infinite, and therefore left out of curves and numbers: {', '.join(names)}"
    return [_shown("not finite", steps, message)] if steps else []


def _shown(name: str, steps: Sequence[int], message: str) -> Shown:
    return Shown(name, steps[0], steps[-1], len(steps), message)
