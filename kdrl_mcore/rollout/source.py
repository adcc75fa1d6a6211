"""The sources of a step's rollouts: sampled with the student's present weights, sampled one step ahead (`ahead.py`), replayed
from a file (`replay.py`), or given (`given.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import EngineError
from kdrl_mcore.reward.verifier import Verifier, verify_together
from kdrl_mcore.rollout.engine import OnPart, RolloutEngine, Sampling, Weights
from kdrl_mcore.rollout.group_filter import Filled, GroupFilter
from kdrl_mcore.types import Rollout


class RolloutSource(ABC):
    """Provides the rollouts of each step. Methods are collective over the world unless documented otherwise. The methods that
    are not abstract do nothing for sources that sample nothing."""

    samples = False
    """Whether an engine samples them with the student's weights, so that its log-probs must match the trainer's."""

    @abstractmethod
    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """The step's rollouts, the same list on every rank.

        Args:
            step: counted from 1.
            on_part: called with complete groups while the others are being sampled, if the configuration enables it.
        """

    @abstractmethod
    def first(self, count: int, sampling: Sampling) -> list[Rollout]:
        """At most `count` rollouts for checks, the same at every call; the source does not advance. If sampled, they are
        responses to the first prompts, drawn with `sampling`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The source's state for a checkpoint: the cursor of the prompts, and the responses sampled ahead. Not collective."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """Continue from a `state_dict`. Not collective.

        Args:
            resamples: the sampling settings have changed, so responses sampled ahead are dropped and their prompts are
                sampled again.
        """

    @property
    def counts(self) -> dict[str, float]:
        """Metrics of how the last step's rollouts were chosen; empty unless groups are filtered."""
        return {}

    @property
    def chosen(self) -> Sequence[int] | None:
        """The place of each of the last step's rollouts among all that were sampled for it, by which `on_part` was given them;
        None where all were taken, in order."""
        return None

    def refit(self) -> None:  # noqa: B027
        """Give the engine the student's present weights, so that the next step is sampled with them."""

    def verify(self, rollouts: Sequence[Rollout]) -> None:  # noqa: B027
        """Set the reward and the correctness of each rollout, unless they were given with it."""

    def finish(self) -> None:  # noqa: B027
        """Wait for the responses being sampled ahead, so that a checkpoint can hold them and the engine is free."""

    def close(self) -> None:  # noqa: B027
        """End the verifier's processes. Not collective."""


class SampledRollouts(RolloutSource):
    """Samples each step's responses to the next prompts with the student's present weights."""

    samples = True

    def __init__(
        self,
        engine: RolloutEngine,
        student: Weights,
        prompts: PromptStream,
        verifier: Verifier | None,
        sampling: Sampling,
        group_filter: GroupFilter | None = None,
    ) -> None:
        """Args:
        verifier: the verifier on the ranks that verify, None on the others.
        sampling: the settings of every step; the step's number is appended to their key, and that of a further round.
        group_filter: None takes the groups as they are sampled.
        """
        self.engine, self.prompts, self.verifier = engine, prompts, verifier
        self._student, self._sampling = student, sampling
        self._filter = group_filter
        self._filled: Filled | None = None  # the last step's
        self._staleness = 0  # optimizer updates by which the student may be ahead of the sampling weights

    def refit(self) -> None:
        """See `RolloutSource`."""
        self.engine.refit(self._student)

    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutSource`.

        Raises:
            EngineError: on all ranks: the engine failed, or sampled with stale weights.
        """
        if self._filter is None:
            rollouts = self._sample(step, on_part)
        else:
            first = self._sample(step, self._scoring(on_part, 0))
            self._verify(first)
            self._filled = self._filter.fill(first, partial(self._sample_more, step, on_part))
            rollouts = self._filled.rollouts
        self._begin_next(step)
        self.engine.sleep()
        refuse_stale(rollouts, self._student.version, self._staleness)
        return rollouts

    def first(self, count: int, sampling: Sampling) -> list[Rollout]:
        """See `RolloutSource`."""
        self.refit()
        rollouts = self.engine.generate(self.prompts.first(count), sampling)
        self.engine.sleep()
        return rollouts

    @property
    def counts(self) -> dict[str, float]:
        """See `RolloutSource`."""
        return {} if self._filled is None else self._filled.counts

    @property
    def chosen(self) -> Sequence[int] | None:
        """See `RolloutSource`."""
        return None if self._filled is None else self._filled.places

    def verify(self, rollouts: Sequence[Rollout]) -> None:
        """See `RolloutSource`. Done already where groups are filtered."""
        if self._filter is None:
            self._verify(rollouts)

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`."""
        return {"prompts": self.prompts.state_dict(), "pending": None}

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`. Prompts for which the checkpoint holds responses sampled ahead are sampled again."""
        _load_cursor(self.prompts, state)

    def close(self) -> None:
        """See `RolloutSource`."""
        if self.verifier is not None:
            self.verifier.close()

    def _sample(self, step: int, on_part: OnPart | None) -> list[Rollout]:
        return self.engine.generate(self.prompts.next_batch(), self._sampling_of(step), on_part)

    def _sample_more(self, step: int, on_part: OnPart | None, number: int, before: int) -> list[Rollout]:
        """Verified responses to further prompts of a step, for which `before` responses were sampled already."""
        scoring = self._scoring(on_part, before)
        rollouts = self.engine.generate(self.prompts.next_batch(), self._sampling_of(step, number), scoring)
        self._verify(rollouts)
        return rollouts

    def _scoring(self, on_part: OnPart | None, before: int) -> OnPart | None:
        """`on_part` of those groups of a round that the filter may keep, by their places among all that are sampled for the
        step."""
        group_filter = self._filter
        if on_part is None or group_filter is None:
            return None

        def score(part: Mapping[int, Rollout]) -> None:
            worth = group_filter.worth_scoring(part)
            if worth:
                on_part({before + place: rollout for place, rollout in worth.items()})

        return score

    def _verify(self, rollouts: Sequence[Rollout]) -> None:
        """The replicas' leaders share the groups, unless the engine has verified them already."""
        if not self.engine.verifies:
            verify_together(self._student.parts.groups, self.verifier, rollouts)

    def _begin_next(self, step: int) -> None:
        """Called when all of a step's responses are there."""

    def _sampling_of(self, *key: int) -> Sampling:
        return replace(self._sampling, key=(*self._sampling.key, *key))


def refuse_stale(rollouts: Sequence[Rollout], version: int, allowed: int) -> None:
    """Refuse a batch with a response whose weights are more than `allowed` updates older than the student's `version`.

    Raises:
        EngineError: the message names the oldest response.
    """
    oldest = min(rollouts, key=lambda rollout: rollout.weight_version, default=None)
    if oldest is not None and version - oldest.weight_version > allowed:
        raise EngineError(
            f"a response to prompt {oldest.prompt_id} was sampled with weights of version {oldest.weight_version}, the student "
            f"has version {version}: rollout.steps_ahead allows {allowed} updates between them; the engine was not refitted"
        )


def _load_cursor(prompts: PromptStream, state: dict[str, Any]) -> None:
    """Set the stream's cursor as if nothing had been sampled ahead. A checkpoint of replayed rollouts has no cursor."""
    cursor, pending = state["prompts"], state.get("pending")
    if pending:
        drawn = len({row["group_id"] for row in pending})
        before = {**cursor, "given": cursor["given"] - drawn}  # for checkpoints without prompts_before_pending
        cursor = state.get("prompts_before_pending") or before
    if cursor is not None:
        prompts.load_state_dict(cursor)
