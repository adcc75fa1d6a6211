"""The lineage of a run: which checkpoints of its directory belong to its past.

A run begins a branch, and another one when it is sent back to an earlier checkpoint or to the start (`checkpoint.resume=PATH`
or `never`). A lineage is the chain of branches that led to the current one; each but the last counts up to some step. The same
folder may hold checkpoints of other branches, from which a run resumes only if they are named.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_mcore.convert.folders import STATE_FILE

EARLIER = ""
"""The branch of every checkpoint that does not name one because its version did not record lineages."""


@dataclass(frozen=True)
class Lineage:
    """Branches, each with its last step that counts; None for the last branch, which is the current one."""

    segments: tuple[tuple[str, int | None], ...] = ((EARLIER, None),)

    @property
    def branch(self) -> str:
        """The current branch."""
        return self.segments[-1][0]

    def has(self, branch: str, step: int) -> bool:
        """Whether a step of a branch belongs to this lineage."""
        return any(branch == name and (until is None or step <= until) for name, until in self.segments)

    def shared(self, other: Lineage, step: int) -> int | None:
        """The last step that this lineage shares with the first `step` steps of `other`; None if there is none."""
        last = None
        for (name, until), (other_name, other_until) in zip(self.segments, other.segments, strict=False):
            if name != other_name:
                break
            last = min([step, *(each for each in (until, other_until) if each is not None)])
            if until != other_until:
                break
        return last

    def branched_off(self, step: int) -> Lineage:
        """A new branch that begins after `step` of this lineage."""
        past: list[tuple[str, int | None]] = []
        for name, until in self.segments:
            past.append((name, step if until is None or until >= step else until))
            if past[-1][1] == step:
                break
        return Lineage((*past, (_new_branch(), None)))

    def as_json(self) -> list[list[Any]]:
        """The lineage as it is stored in a checkpoint's state."""
        return [list(segment) for segment in self.segments]


def new_lineage() -> Lineage:
    """The lineage of a run that begins with its first step."""
    return Lineage(((_new_branch(), None),))


def from_json(value: Any) -> Lineage:
    """The lineage from the result of `as_json`, or if there is none, from `EARLIER`."""
    return Lineage(tuple((str(name), until) for name, until in value)) if value else Lineage()


def lineage_of(checkpoint: Path) -> Lineage | None:
    """The lineage of a checkpoint; None where its state cannot be read."""
    try:
        return from_json(json.loads((checkpoint / STATE_FILE).read_text()).get("lineage"))
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _new_branch() -> str:
    return secrets.token_hex(4)
