"""What every rollout engine is: prompts in, sampled responses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kdrl_mcore.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `key` makes each call's draws its own."""

    temperature: float
    top_p: float
    max_response_tokens: int
    copies: int
    key: tuple[int, ...]


class RolloutEngine(Protocol):
    """Samples with the student's current weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """`copies` responses to each prompt, unverified, on every rank of the world, in the order of the prompts.

        Collective over the world: every rank passes the same prompts.
        """
        ...
