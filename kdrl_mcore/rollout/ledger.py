"""The ledger of prompts. A prompt is drawn, sampled, verified, and then either trained on or dropped for a stated reason,
exactly once. In whatever order prompts are sampled, only the ledger records which are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdrl_mcore.data.stream import Position, PromptStream
from kdrl_mcore.rollout.files import FINISH_REASONS, from_row, to_row
from kdrl_mcore.types import Prompt, Rollout


@dataclass(frozen=True)
class Draw:
    """What determines the random numbers of a prompt's responses: the step for which the prompt was drawn, the number of the
    further round in that step (0 for the step's first prompts), and the prompt's index in that round."""

    step: int
    round: int
    index: int

    @property
    def key(self) -> tuple[int, ...]:
        """The part of the random key that this round's prompts share."""
        return (self.step, self.round) if self.round else (self.step,)


@dataclass(eq=False)
class Entry:
    """A prompt from its draw until it is trained on or dropped.

    Attributes:
        position: its position in the data.
        draw: None if it must be sampled again, for the next step that draws prompts.
        rollouts: its responses once all have been sampled, otherwise None.
        begun: its responses so far, some of them unfinished, until all have been sampled; None before the first.
    """

    position: Position
    prompt: Prompt
    draw: Draw | None = None
    rollouts: list[Rollout] | None = None
    begun: list[Rollout] | None = None

    def record(self, first: int, rollouts: Sequence[Rollout]) -> None:
        """Record responses, new or continued, from number `first` of the group on."""
        group = list(self.begun or ())
        group[first : first + len(rollouts)] = rollouts
        if any(map(is_unfinished, group)):
            self.begun = group
        else:
            self.rollouts, self.begun = group, None


class Ledger:
    """Every prompt that a run has drawn: the waiting ones, and counts of those that were trained on or dropped.

    Every rank keeps the same ledger; nothing is communicated.
    """

    def __init__(self, prompts: PromptStream) -> None:
        self.prompts = prompts
        self.waiting: list[Entry] = []
        """The prompts that were neither trained on nor dropped, in the order in which they were drawn."""
        self.until = 0
        """The last step for which prompts were drawn."""
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        """How many were dropped, by reason."""

    @property
    def drawn(self) -> int:
        """The number of prompts drawn."""
        return self.prompts.given

    def draw(self, step: int, round: int = 0) -> list[Entry]:
        """Prompts for a step: first those that must be sampled again, then new ones from the stream."""
        entries = [entry for entry in self.waiting if entry.draw is None][: self.prompts.batch_size]
        fresh = [Entry(*drawn) for drawn in self.prompts.draw(self.prompts.batch_size - len(entries))]
        self.waiting += fresh
        entries += fresh
        for index, entry in enumerate(entries):
            entry.draw = Draw(step, round, index)
        self.until = step
        return entries

    def draw_until(self, step: int, first: int) -> None:
        """Draw prompts for each step from `first` up to this one, unless they have been drawn."""
        for each in range(max(self.until + 1, first), step + 1):
            self.draw(each)

    def due(self, step: int) -> list[Entry]:
        """The waiting prompts that were drawn for this step or an earlier one."""
        return [entry for entry in self.waiting if entry.draw is not None and entry.draw.step <= step]

    def sampled(self, entries: Sequence[Entry], rollouts: Iterable[Rollout]) -> list[Entry]:
        """Record the responses to prompts that were sampled together, numbered in the order of the prompts. Returns the
        entries."""
        for entry, group in zip(entries, groups_of(rollouts), strict=True):
            entry.record(0, group)
        return list(entries)

    def train(self, entries: Sequence[Entry]) -> list[Rollout]:
        """Count prompts as trained on; returns their responses, with the groups numbered in this order."""
        self._end(entries)
        self.trained += len(entries)
        return [
            rollout if rollout.group_id == group else replace(rollout, group_id=group)
            for group, entry in enumerate(entries)
            for rollout in entry.rollouts or ()
        ]

    def drop(self, entries: Sequence[Entry], reason: str) -> None:
        """Count prompts as dropped."""
        self._end(entries)
        self.dropped[reason] += len(entries)

    def forget_responses(self) -> None:
        """Drop the responses of all waiting prompts, which are then sampled again for later steps."""
        self.until = 0
        for entry in self.waiting:
            entry.draw = entry.rollouts = entry.begun = None

    def check(self) -> None:
        """Assert that the ledger balances."""
        ended = self.trained + self.dropped.total()
        assert self.drawn == ended + len(self.waiting), f"{self.drawn} prompts drawn, {ended} ended, {len(self.waiting)} wait"

    def counts(self) -> dict[str, float]:
        """The counts so far, as metrics."""
        dropped, waiting = self.dropped.total(), len(self.waiting)
        counts = {"drawn": self.drawn, "trained": self.trained, "dropped": dropped, "waiting": waiting}
        return {f"prompts_{name}": float(count) for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON: the cursor of the prompts, the counts, and the waiting prompts with their
        responses as lines of a rollout file."""
        waiting = [
            {
                "place": list(entry.position),
                "draw": None if entry.draw is None else [entry.draw.step, entry.draw.round, entry.draw.index],
                "responses": _rows(entry.rollouts),
                "begun": _rows(entry.begun),
            }
            for entry in self.waiting
        ]
        counts = {"until": self.until, "trained": self.trained, "dropped": dict(self.dropped)}
        return {"prompts": self.prompts.state_dict(), "ledger": {**counts, "waiting": waiting}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, including one of version 0.2, which had no counts."""
        if "ledger" not in state:
            self._load_0_2(state)
            return
        self.prompts.load_state_dict(state["prompts"])
        ledger = state["ledger"]
        self.until, self.trained, self.dropped = ledger["until"], ledger["trained"], Counter(ledger["dropped"])
        self.waiting = []
        for row in ledger["waiting"]:
            name, number = row["place"]
            entry = Entry((name, number), self.prompts.at((name, number)), None if row["draw"] is None else Draw(*row["draw"]))
            entry.rollouts, entry.begun = (_responses(row.get(name), entry.prompt) for name in ("responses", "begun"))
            self.waiting.append(entry)

    def _load_0_2(self, state: dict[str, Any]) -> None:
        """Load the cursor and, if there are any, the complete responses to the next step's prompts. A checkpoint of replayed
        rollouts has no cursor."""
        cursor, pending, self.waiting = state["prompts"], state.get("pending"), []
        if cursor is None:
            return
        if pending:
            groups = groups_of(map(from_row, pending))
            self.until = state["step"] + 1
            before = {**cursor, "given": cursor["given"] - len(groups)}
            self.prompts.load_state_dict(state.get("prompts_before_pending") or before)
            for index, (position, prompt) in enumerate(self.prompts.draw(len(groups))):
                self.waiting.append(Entry(position, prompt, Draw(self.until, 0, index), groups[index]))
        self.prompts.load_state_dict(cursor)
        self.trained = self.drawn - len(self.waiting)

    def _end(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.waiting.remove(entry)  # raises if it is done already


def _rows(rollouts: Sequence[Rollout] | None) -> list[dict[str, Any]] | None:
    return None if rollouts is None else [to_row(rollout) for rollout in rollouts]


def _responses(rows: Sequence[Any] | None, prompt: Prompt) -> list[Rollout] | None:
    if rows is None:
        return None
    return [
        replace(from_row(row, (*FINISH_REASONS, "partial")), columns=prompt.columns, teacher_prompts=prompt.teacher_prompts)
        for row in rows
    ]


def is_unfinished(rollout: Rollout) -> bool:
    """Whether a response waits to be continued."""
    return rollout.finish_reason == "partial"


def groups_of(rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
    """The responses of each group, in the order of the groups."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    return list(groups.values())
