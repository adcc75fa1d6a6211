"""The sources of a step's rollouts: sampled with the student's weights, replayed from a file (`replay.py`), or given
(`given.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import EngineError
from kdrl_mcore.reward.verifier import Verifier, verify_together
from kdrl_mcore.rollout.engine import Choose, FlowingEngine, OnPart, RolloutEngine, Sampling, Weights
from kdrl_mcore.rollout.group_filter import Choice, GroupFilter
from kdrl_mcore.rollout.ledger import Entry, Ledger
from kdrl_mcore.rollout.partial import PartialSampling, continuation_metrics
from kdrl_mcore.types import Rollout


class RolloutSource(ABC):
    """Provides the rollouts of each step. Methods are collective over the world unless documented otherwise. Those that are not
    abstract do nothing in sources that sample nothing."""

    samples = False
    """Whether an engine samples the rollouts with the student's weights, so that its log-probs must match the trainer's."""

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
        """The source's state for a checkpoint: the cursor of the prompts and, if there is one, the ledger. Not collective."""

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
        """The index of each of the last step's rollouts among all that were sampled for it, which is also its key in the parts
        of `on_part`; None if all were used, in order."""
        return None

    def refit(self) -> None:  # noqa: B027
        """Send the student's current weights to the engine, so that the next step is sampled with them."""

    def verify(self, rollouts: Sequence[Rollout]) -> None:  # noqa: B027
        """Set the reward and the correctness of each rollout, unless it already has them."""

    def prepare_refit(self) -> None:  # noqa: B027
        """Before the engine gets new weights, wait for the responses that must not continue with them."""

    def finish(self) -> None:  # noqa: B027
        """Wait for the responses that are being sampled ahead, so that a checkpoint can contain them."""

    def close(self) -> None:  # noqa: B027
        """End the verifier's processes. Not collective."""


@dataclass(frozen=True)
class Ahead:
    """How responses are sampled ahead of the steps that train on them.

    Attributes:
        how: the engine that samples while the student trains; or how responses are cut into parts, which the engine samples
            one by one before the student trains.
        steps: for how many later steps prompts have been drawn while a step trains.
        max_age: the most steps between the weights that sampled a token and the step that trains on it. If it equals `steps`,
            groups are trained on in the order in which their prompts were drawn; if it is larger, complete groups overtake
            others until those are due.
        waits: whether a refit waits for unfinished responses; otherwise they continue with the new weights.
        last_step: the run's last step, after which nothing is drawn.
        updates_per_step: optimizer updates of a step.
    """

    how: FlowingEngine | PartialSampling
    steps: int
    max_age: int
    waits: bool
    last_step: int
    updates_per_step: int


class SampledRollouts(RolloutSource):
    """Samples each step's responses with the student's weights, when the step begins or steps ahead. The ledger records which
    prompts have been drawn, and which of them are waiting."""

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
        sampling: the settings of every step; the numbers of the step and of a further round are appended to their key.
        group_filter: None uses all sampled groups.
        ahead: None samples a step's responses when it begins.
        """
        self.engine, self.prompts, self.verifier = engine, prompts, verifier
        self.ledger = Ledger(prompts)
        self._student, self._sampling, self._ahead = student, sampling, ahead
        self._filter = group_filter
        self._choice: Choice | None = None  # the filter's, of the last step
        self._measures: dict[str, float] = {}  # of the last step's responses, where they are sampled ahead
        self._submitted: dict[int, Entry] = {}  # what the engine samples ahead, by its ticket

    def refit(self) -> None:
        """See `RolloutSource`."""
        self.prepare_refit()
        self.engine.refit(self._student)

    def prepare_refit(self) -> None:
        """See `RolloutSource`."""
        if self._ahead is not None and self._ahead.waits:
            self.finish()

    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutSource`.

        Raises:
            EngineError: on all ranks: the engine failed, or sampled with stale weights.
        """
        ahead = self._ahead
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
        if ahead is not None:
            self._measures = ages(rollouts, self._student.version)
            if isinstance(ahead.how, PartialSampling):
                self._measures |= continuation_metrics(rollouts, self.ledger.waiting)
            else:
                self._draw_ahead(step, ahead)
                self._submit()
        self.ledger.check()
        self.engine.sleep()
        refuse_stale(rollouts, self._student.version, 0 if ahead is None else ahead.max_age * ahead.updates_per_step)
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
        return ({} if self._choice is None else self._choice.counts) | self._measures | self.ledger.counts()

    @property
    def chosen(self) -> Sequence[int] | None:
        """See `RolloutSource`."""
        return None if self._choice is None else self._choice.indices

    def verify(self, rollouts: Sequence[Rollout]) -> None:
        """See `RolloutSource`. Does nothing if groups are filtered, because the filter has verified them."""
        if self._filter is None:
            self._verify(rollouts)

    def finish(self) -> None:
        """See `RolloutSource`."""
        if self._submitted:
            self._take_out(lambda complete: list(self._submitted) if self._submitted.keys() <= set(complete) else None)

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`: the ledger. Responses that are still being sampled count as not begun."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`."""
        self.ledger.load_state_dict(state)
        self._submitted = {}
        if resamples or self._ahead is None:
            self.ledger.forget_responses()

    def close(self) -> None:
        """See `RolloutSource`."""
        if self.verifier is not None:
            self.verifier.close()

    def _groups_of(self, step: int, on_part: OnPart | None) -> list[Entry]:
        """The step's first prompts with their responses."""
        self.ledger.draw_until(step, step)
        if self._ahead is None:
            return self._sample_now(self.ledger.due(step), on_part)
        if isinstance(self._ahead.how, PartialSampling):
            self._draw_ahead(step, self._ahead)
        due = self.ledger.due(step - (self._ahead.max_age - self._ahead.steps))
        return self._first_complete(self.prompts.batch_size, due)

    def _draw_ahead(self, step: int, ahead: Ahead) -> None:
        """Draw the prompts of the steps after this one that may be sampled now."""
        self.ledger.draw_until(min(step + ahead.steps, ahead.last_step), step + 1)

    def _further_groups(self, step: int, on_part: OnPart | None, number: int, before: int) -> list[Entry]:
        """Further prompts of a step with their verified responses; `before` is the number of responses sampled for it so
        far."""
        entries = self.ledger.draw(step, number)
        if self._ahead is None:
            self._sample_now(entries, self._scoring(on_part, before))
        else:
            self._first_complete(len(entries), entries)
        self._verify([rollout for entry in entries for rollout in entry.rollouts or ()])
        return entries

    def _sample_now(self, entries: list[Entry], on_part: OnPart | None) -> list[Entry]:
        """Sample the responses to prompts that were drawn together."""
        prompts, sampling = [entry.prompt for entry in entries], self._sampling_of(entries[0])
        return self.ledger.sampled(entries, self.engine.generate(prompts, sampling, on_part))

    def _first_complete(self, count: int, due: Sequence[Entry]) -> list[Entry]:
        """Wait for `count` groups: those that are due, then those that are complete first."""
        assert self._ahead is not None

        def picked(complete: Sequence[Entry]) -> list[Entry] | None:
            others = [entry for entry in complete if entry not in due]
            if len(complete) - len(others) < len(due) or len(complete) < count:
                return None
            return [*due, *others][:count]

        if isinstance(self._ahead.how, PartialSampling):
            while True:  # at least one part, so that every unfinished response grows in every step
                self._ahead.how.sample(self.engine, self.ledger.waiting, self._sampling)
                chosen = picked(self._complete())
                if chosen is not None:
                    return chosen
        self._submit()
        before = self._complete()

        def choose(tickets: Sequence[int]) -> list[int] | None:
            chosen = picked([*before, *(self._submitted[ticket] for ticket in tickets if ticket in self._submitted)])
            return None if chosen is None else [ticket for ticket in tickets if self._submitted.get(ticket) in chosen]

        chosen = picked(before)
        if chosen is None:
            chosen = picked(before + self._take_out(choose))
        assert chosen is not None
        return chosen

    def _complete(self) -> list[Entry]:
        return [entry for entry in self.ledger.waiting if entry.rollouts is not None]

    def _submit(self) -> None:
        """Submit the waiting prompts without responses to the engine, in the order in which they were drawn."""
        assert self._ahead is not None and not isinstance(self._ahead.how, PartialSampling)
        begun = set(self._submitted.values())
        missing = [entry for entry in self.ledger.waiting if entry.draw and entry.rollouts is None and entry not in begun]
        for _, together in groupby(missing, key=_key_of):
            entries = list(together)
            indices = [entry.draw.index for entry in entries if entry.draw is not None]
            prompts = [entry.prompt for entry in entries]
            tickets = self._ahead.how.submit(prompts, self._sampling_of(entries[0]), indices)
            self._submitted.update(zip(tickets, entries, strict=True))

    def _take_out(self, choose: Choose) -> list[Entry]:
        """Take complete groups from the engine. Returns their prompts."""
        assert self._ahead is not None and not isinstance(self._ahead.how, PartialSampling)
        taken = []
        for ticket, rollouts in self._ahead.how.collect(choose).items():
            entry = self._submitted.pop(ticket)
            entry.record(0, rollouts)
            taken.append(entry)
        return taken

    def _scoring(self, on_part: OnPart | None, before: int) -> OnPart | None:
        """`on_part` for those groups of a round that the filter may keep, by their indices among all that are sampled for the
        step."""
        group_filter = self._filter
        if on_part is None or group_filter is None:
            return None

        def score(part: Mapping[int, Rollout]) -> None:
            worth = group_filter.worth_scoring(part)
            if worth:
                on_part({before + index: rollout for index, rollout in worth.items()})

        return score

    def _verify(self, rollouts: Sequence[Rollout]) -> None:
        """Verify responses, divided among the replicas' leaders by group, unless the engine has already done so."""
        in_parts = self._ahead is not None and isinstance(self._ahead.how, PartialSampling)
        if in_parts or not self.engine.verifies:
            verify_together(self._student.parts.groups, self.verifier, rollouts)

    def _sampling_of(self, entry: Entry) -> Sampling:
        return replace(self._sampling, key=(*self._sampling.key, *_key_of(entry)))


def _key_of(entry: Entry) -> tuple[int, ...]:
    assert entry.draw is not None
    return entry.draw.key


def ages(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """The mean and the largest age of the tokens of a batch, as metrics. The age is the number of updates by which the weights
    that sampled a token are older than `version`."""
    counted = [(version - each, tokens) for rollout in rollouts for each, tokens in rollout.versions]
    mean = sum(age * tokens for age, tokens in counted) / sum(tokens for _, tokens in counted)
    return {"token_age": mean, "token_age_max": float(max(age for age, _ in counted))}


def refuse_stale(rollouts: Sequence[Rollout], version: int, allowed: int) -> None:
    """Refuse a batch with a response whose weights are more than `allowed` updates older than the student's `version`.

    Raises:
        EngineError: the message names the oldest response.
    """
    oldest = min(rollouts, key=lambda rollout: rollout.weight_version, default=None)
    if oldest is not None and version - oldest.weight_version > allowed:
        raise EngineError(
            f"a response to prompt {oldest.prompt_id} was sampled with weights of version {oldest.weight_version}, but the "
            f"student has version {version}: rollout.steps_ahead and rollout.max_age allow {allowed} updates between them; the "
            "engine was not refitted"
        )
