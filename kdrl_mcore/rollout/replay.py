"""Replay: train on the responses of a rollout file, with their recorded rewards and sampler log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrl_mcore.data.limits import Limits, check_rollouts
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.rollout.engine import OnPart, Sampling
from kdrl_mcore.rollout.files import read_rollouts
from kdrl_mcore.rollout.source import RolloutSource
from kdrl_mcore.types import Rollout

LOG_PROBS = (-24.0, 1e-3)
"""The range of log-probs of sampled tokens, nats: a token of probability e^-24 is drawn once in 26 billion, and a value above 0
is rounding. The importance weight pi / mu of a token below the range would outweigh all others."""


class ReplayedRollouts(RolloutSource):
    """Provides the whole file at every step. Nothing is sampled or verified: rewards come from the file."""

    def __init__(self, path: str | Path, limits: Limits, updates: int) -> None:
        """Read and check the file.

        Args:
            limits: the models' limits on token ids and lengths.
            updates: the number of updates per step, among which the groups are divided.

        Raises:
            DataError: the file is missing or damaged, a line exceeds the limits, or a log-prob is outside `LOG_PROBS`.
            ConfigError: the file has fewer groups than there are updates.
        """
        self._rollouts = read_rollouts(Path(path))
        check_rollouts(self._rollouts, path, limits)
        low, high = LOG_PROBS
        for line, rollout in enumerate(self._rollouts, start=1):
            outside = (rollout.sampler_log_probs < low) | (rollout.sampler_log_probs > high)
            if outside.any():
                token = int(outside.argmax())
                raise DataError(
                    f"{path} line {line}: the sampler's log-prob of response token {token} is "
                    f"{rollout.sampler_log_probs[token]:g}, those of sampled tokens lie between {low:g} and 0: write natural "
                    "logarithms of the sampler's own probabilities, or remove the line"
                )
        groups = len({rollout.group_id for rollout in self._rollouts})
        if updates > groups:
            raise ConfigError(f"batch.updates_per_step={updates}, but {path} has {groups} groups to share among them: lower it")

    @property
    def every(self) -> list[Rollout]:
        """The file's rollouts, one per line."""
        return self._rollouts

    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutSource`."""
        return list(self._rollouts)

    def first(self, count: int, sampling: Sampling) -> list[Rollout]:
        """See `RolloutSource`."""
        return self._rollouts[:count]

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`. There is no state, as there are no prompts."""
        return {"prompts": None}

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`. There is nothing to restore, as every step is the same."""
