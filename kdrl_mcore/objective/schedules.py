"""Coefficients and the learning rate as functions of the optimizer step."""

from __future__ import annotations

import math
from typing import Any

from kdrl_mcore.config import OptimizerConfig, ScheduleConfig
from kdrl_mcore.errors import ConfigError


class Coefficient:
    """alpha_t or beta_t; t counts optimizer steps.

    constant: init. linear: max(init - delta t, min). cosine: from init to min over `steps`. switch: init before step
        `steps`, then `after`.
    adaptive: beta <- clip(beta exp(eta (KL / target - 1)), min, max) on the measured KL per token.
    """

    def __init__(self, schedule: ScheduleConfig) -> None:
        """Raises ConfigError for settings that make no schedule."""
        if schedule.kind in ("cosine", "switch") and schedule.steps <= 0:
            raise ConfigError(f"a {schedule.kind} schedule needs steps > 0, not {schedule.steps}")
        if schedule.kind == "adaptive" and (schedule.target <= 0 or schedule.init <= 0):
            raise ConfigError("an adaptive schedule needs target > 0 (the KL per token to hold) and init > 0")
        self._schedule = schedule
        self._step = 0
        self._adapted = schedule.init

    @property
    def value(self) -> float:
        """The coefficient of the coming optimizer step."""
        s, t = self._schedule, self._step
        if s.kind == "linear":
            return max(s.init - s.delta * t, s.min)
        if s.kind == "cosine":
            return s.min + (s.init - s.min) * 0.5 * (1 + math.cos(math.pi * min(t / s.steps, 1.0)))
        if s.kind == "switch":
            return s.init if t < s.steps else s.after
        return self._adapted

    def advance(self, kl_per_token: float | None) -> None:
        """An optimizer step was taken. `kl_per_token` is the KL to the teacher it measured, or None if it measured none."""
        self._step += 1
        s = self._schedule
        if s.kind == "adaptive" and kl_per_token is not None:
            # The exponent is bounded so that one wild measurement cannot overflow.
            exponent = min(max(s.eta * (kl_per_token / s.target - 1), -1.0), 1.0)
            self._adapted = min(max(self._adapted * math.exp(exponent), s.min), s.max)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self._step, "adapted": self._adapted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._step, self._adapted = int(state["step"]), float(state["adapted"])


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step` (0 is the first): linear warm-up, then constant, linear or cosine to
    `min_lr`."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = min((step - optimizer.warmup_steps) / max(total_steps - optimizer.warmup_steps, 1), 1.0)
    remaining = 1 - progress if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * remaining
