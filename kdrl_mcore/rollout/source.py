"""The sources of a step's rollouts: sampled with the student's weights, replayed from a file (`replay.py`), or given
(`given.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import EngineError
from kdrl_mcore.reward.verifier import Verifier, verify_together
from kdrl_mcore.rollout.engine import BackgroundEngine, OnPart, RolloutEngine, Sampling, Weights
from kdrl_mcore.rollout.group_filter import Choice, GroupFilter
from kdrl_mcore.rollout.ledger import Entry, Ledger
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
        """The source's state for a checkpoint: the cursor of the prompts, and the ledger where there is one. Not collective."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """Continue from a `state_dict`. Not collective.

        Args:
            resamples: the sampling settings have changed, so responses sampled ahead are dropped and their prompts are
                sampled again.
        """

    @property
    def counts(self) -> dict[str, float]:
        """Metrics of how the last step's rollouts were chosen, and of the ledger; empty for sources that sample nothing."""
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


@dataclass(frozen=True)
class Ahead:
    """What sampling one step ahead needs.

    Attributes:
        engine: the engine, which samples in the background.
        last_step: the run's last step, during which nothing more is begun.
        updates_per_step: optimizer updates by which the student is ahead of the sampling weights when it trains.
    """

    engine: BackgroundEngine
    last_step: int
    updates_per_step: int


class SampledRollouts(RolloutSource):
    """Samples each step's responses with the student's weights: its present ones, or one step ahead with those that it had when
    the step before began to train. The ledger knows which prompts are drawn, and which of them wait for their end."""

    samples = True

    def __init__(
        self,
        engine: RolloutEngine,
        student: Weights,
        prompts: PromptStream,
        verifier: Verifier | None,
        sampling: Sampling,
        group_filter: GroupFilter | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """Args:
        verifier: the verifier on the ranks that verify, None on the others.
        sampling: the settings of every step; the step's number is appended to their key, and that of a further round.
        group_filter: None takes the groups as they are sampled.
        ahead: None samples a step's responses when it begins.
        """
        self.engine, self.prompts, self.verifier = engine, prompts, verifier
        self.ledger = Ledger(prompts)
        self._student, self._sampling, self._ahead = student, sampling, ahead
        self._filter = group_filter
        self._choice: Choice | None = None  # the filter's, of the last step
        self._begun: list[Entry] = []  # that the engine samples ahead

    def refit(self) -> None:
        """See `RolloutSource`. First waits for the responses that are being sampled with the older weights."""
        self.finish()
        self.engine.refit(self._student)

    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutSource`.

        Raises:
            EngineError: on all ranks: the engine failed, or sampled with stale weights.
        """
        self.finish()
        if self._filter is None:
            chosen = self._groups_of(step, on_part)
        else:
            first = self._groups_of(step, self._scoring(on_part, 0))
            self._verify([rollout for entry in first for rollout in entry.rollouts or ()])
            self._choice = self._filter.fill(first, partial(self._further_groups, step, on_part))
            chosen = self._choice.chosen
            for reason, entries in self._choice.dropped.items():
                self.ledger.drop(entries, reason)
        rollouts = self.ledger.train(chosen)
        self._begin(step + 1)
        self.ledger.check()
        self.engine.sleep()
        refuse_stale(rollouts, self._student.version, 0 if self._ahead is None else self._ahead.updates_per_step)
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
        return ({} if self._choice is None else self._choice.counts) | self.ledger.counts()

    @property
    def chosen(self) -> Sequence[int] | None:
        """See `RolloutSource`."""
        return None if self._choice is None else self._choice.places

    def verify(self, rollouts: Sequence[Rollout]) -> None:
        """See `RolloutSource`. Done already where groups are filtered."""
        if self._filter is None:
            self._verify(rollouts)

    def finish(self) -> None:
        """See `RolloutSource`."""
        if self._begun:
            assert self._ahead is not None
            self.ledger.sampled(self._begun, self._ahead.engine.finish())
            self._begun = []

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`: the ledger. Responses that are still being sampled count as not begun."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`."""
        self.ledger.load_state_dict(state)
        if resamples or self._ahead is None:
            self.ledger.forget_responses()

    def close(self) -> None:
        """See `RolloutSource`."""
        if self.verifier is not None:
            self.verifier.close()

    def _groups_of(self, step: int, on_part: OnPart | None) -> list[Entry]:
        """The step's first prompts with their responses, sampled now unless they were sampled ahead."""
        entries = self.ledger.drawn_for(step) or self.ledger.draw(step)
        if all(entry.rollouts is not None for entry in entries):
            return entries
        return self._sample(entries, self._sampling_of(step), on_part)

    def _further_groups(self, step: int, on_part: OnPart | None, number: int, before: int) -> list[Entry]:
        """Further prompts of a step with their verified responses; `before` responses were sampled for it already."""
        sampling, scoring = self._sampling_of(step, number), self._scoring(on_part, before)
        entries = self._sample(self.ledger.draw(step, number), sampling, scoring)
        self._verify([rollout for entry in entries for rollout in entry.rollouts or ()])
        return entries

    def _sample(self, entries: list[Entry], sampling: Sampling, on_part: OnPart | None = None) -> list[Entry]:
        return self.ledger.sampled(entries, self.engine.generate([entry.prompt for entry in entries], sampling, on_part))

    def _begin(self, step: int) -> None:
        """Begin to sample for the next step, if there is one, unless its responses are there."""
        if self._ahead is None or step > self._ahead.last_step or self.ledger.drawn_for(step):
            return
        self._begun = self.ledger.draw(step)
        self._ahead.engine.begin([entry.prompt for entry in self._begun], self._sampling_of(step))

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
