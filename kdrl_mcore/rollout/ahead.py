"""One step ahead: the engines sample the next step's responses while the student trains on this one's. They are then one step
off-policy, which the importance weights correct; what is under way belongs to the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.files import from_row, to_row
from kdrl_mcore.types import Prompt, Rollout


class BackgroundEngine(Protocol):
    """An engine that samples while its caller does something else."""

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Start; no communication among ranks."""

    def finish(self) -> list[Rollout]:
        """The responses of the last `begin`, as from `RolloutEngine.generate`. Collective over the world."""


class NextBatch:
    """The responses of the coming step: none, being sampled, or complete."""

    def __init__(self, engine: BackgroundEngine) -> None:
        self._engine = engine
        self._rollouts: list[Rollout] | None = None
        self.is_running = False

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Let the engine sample them with the weights it has now."""
        assert self._rollouts is None and not self.is_running
        self._engine.begin(prompts, sampling)
        self.is_running = True

    def finish(self) -> None:
        """Wait until none is under way: the engine can then be refitted. Collective over the world."""
        if self.is_running:
            self._rollouts = self._engine.finish()
            self.is_running = False

    def take(self) -> list[Rollout] | None:
        """The complete batch, once; None if none was begun. Collective over the world."""
        self.finish()
        rollouts, self._rollouts = self._rollouts, None
        return rollouts

    def state_dict(self) -> list[dict[str, Any]] | None:
        """The complete batch as lines of a rollout file; None if there is none."""
        return None if self._rollouts is None else [to_row(rollout) for rollout in self._rollouts]

    def load_state_dict(self, state: Sequence[dict[str, Any]] | None) -> None:
        """Go on with the batch of a checkpoint."""
        self._rollouts = None if state is None else [from_row(row) for row in state]


def refuse_stale(rollouts: Sequence[Rollout], version: int, allowed: int) -> None:
    """Refuse a batch that has a response sampled with weights more than `allowed` updates older than the student's, `version`.

    Raises:
        EngineError: naming the oldest response.
    """
    oldest = min(rollouts, key=lambda rollout: rollout.weight_version, default=None)
    if oldest is not None and version - oldest.weight_version > allowed:
        raise EngineError(
            f"a response to prompt {oldest.prompt_id} was sampled with weights of version {oldest.weight_version}, the student "
            f"has version {version}: rollout.steps_ahead allows {allowed} updates between them; the engine was not refitted"
        )
