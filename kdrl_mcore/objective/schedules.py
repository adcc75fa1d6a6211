"""The coefficients alpha and beta and the learning rate, as functions of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kdrl_mcore.config import OptimizerConfig, ScheduleConfig
from kdrl_mcore.config.derived import SWITCHES
from kdrl_mcore.objective.functions import find_function

OWN: dict[str, Callable[[int, ScheduleConfig], float]] = {}
"""The type of a user's function, MODULE:NAME: (optimizer step, settings) -> coefficient."""


@dataclass
class Record:
    """The highest value so far, and the number of values since then that were not higher."""

    highest: float | None = None
    waited: int = 0

    def observe(self, value: float) -> bool:
        """Record a value; returns whether it is higher than all earlier ones."""
        is_higher = self.highest is None or value > self.highest
        self.highest, self.waited = (value, 0) if is_higher else (self.highest, self.waited + 1)
        return is_higher


class Coefficient:
    """alpha_t or beta_t; t counts optimizer steps.

    constant: init. linear: max(init - delta t, min). cosine: from init to min over `steps`. switch: init before step
        `steps`, then `after`.
    below: init until the measured KL per token is at most `target`, or (1 - `drop`) of the first one, then `after`. With `ramp`
        it rises to init within that many steps, after which it switches at the latest. plateau: init until `patience`
        evaluations in a row have brought no higher accuracy, then `after`. Neither switches back.
    If `delta` is set, the coefficient is max(after - delta (t - s), min) once one of these three has switched at step s.
    MODULE:NAME: what this function of the step and the settings returns.
    adaptive: beta <- clip(beta exp(eta (KL / target - 1)), min, max), from the measured KL per token.
    """

    def __init__(self, schedule: ScheduleConfig) -> None:
        """Start at step 0. `check_config` has already rejected invalid settings."""
        self._schedule = schedule
        self._step = 0
        self._adapted = schedule.init
        self._switched_at: int | None = None
        """The step from which `below` or `plateau` have switched."""
        self._first_kl: float | None = None
        self._accuracy = Record()

    @property
    def value(self) -> float:
        """The coefficient for the next optimizer step."""
        s, t = self._schedule, self._step
        if s.kind == "linear":
            return max(s.init - s.delta * t, s.min)
        if s.kind == "cosine":
            return s.min + (s.init - s.min) * 0.5 * (1 + math.cos(math.pi * min(t / s.steps, 1.0)))
        if s.kind in SWITCHES:
            since = s.steps if s.kind == "switch" else self._switched_at
            if since is None or t < since:
                return s.init * min((t + 1) / s.ramp, 1.0) if s.ramp else s.init
            return max(s.after - s.delta * (t - since), s.min) if s.delta else s.after
        if s.kind == "adaptive":
            return self._adapted
        return s.init if s.kind == "constant" else find_function("the kind of a schedule", s.kind, OWN)(t, s)

    def advance(self, kl_per_token: float | None) -> None:
        """Advance by one optimizer step. `kl_per_token` is the KL to the teacher that the step measured, if any."""
        self._step += 1
        s = self._schedule
        if s.kind == "below" and self._is_low(kl_per_token):
            self._switch()
        if s.kind == "adaptive" and kl_per_token is not None:
            # The exponent is bounded so that one wild measurement cannot overflow.
            exponent = min(max(s.eta * (kl_per_token / s.target - 1), -1.0), 1.0)
            self._adapted = min(max(self._adapted * math.exp(exponent), s.min), s.max)

    def observe(self, accuracy: float) -> None:
        """Record the accuracy of an evaluation."""
        self._accuracy.observe(accuracy)
        if self._schedule.kind == "plateau" and self._accuracy.waited >= self._schedule.patience:
            self._switch()

    def _is_low(self, kl_per_token: float | None) -> bool:
        """Whether `below` switches after this step."""
        s = self._schedule
        if self._first_kl is None:
            self._first_kl = kl_per_token
        highest = (1 - s.drop) * self._first_kl if s.drop and self._first_kl is not None else s.target
        return (kl_per_token is not None and kl_per_token <= highest) or 0 < s.ramp <= self._step

    def _switch(self) -> None:
        if self._switched_at is None:
            self._switched_at = self._step

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "step": self._step,
            "adapted": self._adapted,
            "switched_at": self._switched_at,
            "first_kl": self._first_kl,
            "accuracy": asdict(self._accuracy),
        }

    def load_state_dict(self, state: dict[str, Any], *, restart: bool = False, measures_anew: bool = False) -> None:
        """Resume at the checkpoint's step. With `restart` (the schedule's settings have changed), a coefficient that follows
        measurements starts again at `init`. With `measures_anew` (the evaluation has changed), earlier accuracies are
        forgotten. A checkpoint of an earlier version has no `switched_at` or `first_kl`."""
        self._step = int(state["step"])
        if restart:
            return
        self._adapted, self._switched_at = float(state["adapted"]), state.get("switched_at")
        self._first_kl = state.get("first_kl")
        if not measures_anew:
            self._accuracy = Record(**state.get("accuracy", {}))


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, then constant, or a linear or cosine decay
    from `lr` to `min_lr`. The decay would reach `min_lr` at step `total_steps`, so the last step, `total_steps - 1`, has
    a positive rate even if `min_lr` is 0."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = min((step - optimizer.warmup_steps) / max(total_steps - optimizer.warmup_steps, 1), 1.0)
    remaining = 1 - progress if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * remaining
