"""What every rollout engine is: prompts in, sampled responses out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `key` makes each call's draws its own; `verify` asks an engine that can
    (`RolloutEngine.verifies`) for the rewards too; `part_tokens` are enough for `OnPart` (0: never)."""

    temperature: float
    top_p: float
    max_response_tokens: int
    copies: int
    key: tuple[int, ...]
    verify: bool = False
    part_tokens: int = 0


OnPart = Callable[[Mapping[int, Rollout]], None]
"""Takes whole verified groups, by the responses' place in the batch, while others are still being sampled. Collective over the
world."""


class Weights(Protocol):
    """A model that engines sample with: the student, or one that is only evaluated."""

    parts: ModelParts
    version: int

    def wait_for_weights(self) -> None:
        """Called before its weights are read other than by a forward pass."""


class RolloutEngine(Protocol):
    """Samples with the weights that the student had at the last `refit`. Every method is collective over the world."""

    verifies: bool
    """Whether it verifies responses while others are still being sampled, where `Sampling.verify` asks for it."""

    def refit(self, student: Weights) -> None:
        """Take over the student's present weights, and be ready to sample."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """`copies` responses to each prompt, on every rank of the world, in the order of the prompts.

        Every rank passes the same prompts. An engine that verifies calls `on_part` meanwhile, with parts of the batch of at
        least `part_tokens` tokens, each group at most once.
        """
        ...

    def sleep(self) -> None:
        """Leave the devices to the training; `refit` wakes the engine."""
        ...

    def close(self) -> None:
        """End whatever the engine started. Not collective: also called after an error."""
        ...
