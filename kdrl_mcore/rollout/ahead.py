"""Sampling one step ahead: the engines sample the next step's responses while the student trains on the present ones. The
responses are then one step off-policy, which importance weights correct, and a checkpoint includes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.rollout.engine import OnPart, RolloutEngine, Sampling, Weights
from kdrl_mcore.rollout.files import from_row, to_row
from kdrl_mcore.rollout.group_filter import GroupFilter
from kdrl_mcore.rollout.source import SampledRollouts
from kdrl_mcore.types import Prompt, Rollout


class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that samples in the background."""

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Start sampling. No communication among ranks."""
        ...

    def finish(self) -> list[Rollout]:
        """Wait for the responses of the last `begin` and return them as `RolloutEngine.generate` does. Collective over the
        world."""
        ...


class SampledAhead(SampledRollouts):
    """Returns responses that were sampled during the previous step, and begins to sample those of the next one. At any time the
    next step's responses are not begun (at the start), being sampled, or complete."""

    def __init__(
        self,
        engine: BackgroundEngine,
        student: Weights,
        prompts: PromptStream,
        verifier: Verifier | None,
        sampling: Sampling,
        group_filter: GroupFilter | None = None,
        *,
        last_step: int,
        updates_per_step: int,
    ) -> None:
        """Args:
        last_step: the run's last step, during which nothing more is begun.
        updates_per_step: optimizer updates by which the student is ahead of the sampling weights when it trains.
        """
        super().__init__(engine, student, prompts, verifier, sampling, group_filter)
        self._background, self._last_step, self._staleness = engine, last_step, updates_per_step
        self._rollouts: list[Rollout] | None = None
        self._is_running = False

    def refit(self) -> None:
        """See `RolloutSource`. First waits for the responses that are being sampled with the older weights."""
        self.finish()
        super().refit()

    def finish(self) -> None:
        """See `RolloutSource`."""
        if self._is_running:
            self._rollouts = self._background.finish()
            self._is_running = False

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`. Holds the complete batch of the next step as lines of a rollout file, and the cursor from which
        a run would sample it again. A batch that is still being sampled counts as not begun."""
        if self._rollouts is None:
            return {"prompts": self.prompts.state_dict(before_last_batch=self._is_running), "pending": None}
        return {
            "prompts": self.prompts.state_dict(),
            "pending": [to_row(rollout) for rollout in self._rollouts],
            "prompts_before_pending": self.prompts.state_dict(before_last_batch=True),
        }

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`."""
        pending = None if resamples else state.get("pending")
        if pending:
            self.prompts.load_state_dict(state["prompts"])
            self._rollouts = [from_row(row) for row in pending]
        else:
            super().load_state_dict(state)
            self._rollouts = None

    def _sample(self, step: int, on_part: OnPart | None) -> list[Rollout]:
        self.finish()
        rollouts, self._rollouts = self._rollouts, None
        if rollouts is None:
            rollouts = super()._sample(step, on_part)
        return rollouts

    def _begin_next(self, step: int) -> None:
        if step < self._last_step:
            self._background.begin(self.prompts.next_batch(), self._sampling_of(step + 1))
            self._is_running = True
