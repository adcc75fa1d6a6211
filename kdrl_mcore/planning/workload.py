"""What a step works on, as far as it is not in the configuration: lengths, correctness, and where the rollout engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.config import Config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.layout import Layout
from kdrl_mcore.parallel.packing import plan_micro_batches

MEAN_SHARE = 0.5
"""Mean response length where none is given, as a share of the longest that is allowed."""


@dataclass(frozen=True)
class Workload:
    """One training step's responses.

    Attributes:
        responses: N.
        prompt_tokens: mean.
        response_tokens: mean.
        longest: of the responses.
        correct: the share of correct responses, which a mask keeps from the teacher.
    """

    responses: int
    prompt_tokens: int
    response_tokens: int
    longest: int
    correct: float = 0.6

    def __post_init__(self) -> None:
        if not 1 <= self.response_tokens <= self.longest or self.prompt_tokens < 0 or not 0 <= self.correct <= 1:
            raise ConfigError(
                f"a mean response of {self.response_tokens} tokens (at most {self.longest}), a mean prompt of "
                f"{self.prompt_tokens} and {self.correct:.0%} correct do not describe a batch"
            )

    @cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Response lengths, longest first: spread evenly around the mean, as far as the limits allow."""
        low = max(1, 2 * self.response_tokens - self.longest)
        high = 2 * self.response_tokens - low
        lengths = np.linspace(high, low, self.responses).round().astype(np.int64)
        lengths[0] = self.longest
        return lengths

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return int(self.lengths_N.sum()) + self.responses * self.prompt_tokens

    @property
    def attended(self) -> float:
        """Mean number of tokens before a token, in its sequence."""
        totals = self.lengths_N + self.prompt_tokens
        return float((totals.astype(float) ** 2).sum() / totals.sum() / 2)

    def share(self, parts: int) -> NDArray[np.int64]:
        """Response lengths of the part with the longest response, when dealt out in turn."""
        return self.lengths_N[::parts]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Prompt and response together."""
        return tuple((self.lengths_N + self.prompt_tokens).tolist())


def workload_of(
    config: Config,
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    correct: float = 0.6,
) -> Workload:
    """The configuration's batch; what it does not tell is given or assumed."""
    rollout = config.rollout
    return Workload(
        responses=rollout.prompts_per_step * rollout.responses_per_prompt,
        prompt_tokens=prompt_tokens if prompt_tokens is not None else min(256, rollout.max_prompt_tokens),
        response_tokens=response_tokens or max(1, round(MEAN_SHARE * rollout.max_response_tokens)),
        longest=rollout.max_response_tokens,
        correct=correct,
    )


@dataclass(frozen=True)
class Packing:
    """The most loaded data-parallel rank.

    Attributes:
        tokens: that it works through.
        micro_batches: of every rank.
        largest: tokens of the largest micro-batch.
        stall: by how much longer a pipeline takes because its stages, at work on neighbouring micro-batches, wait for the
            longest of them.
    """

    tokens: int
    micro_batches: int
    largest: int
    stall: float


@cache
def packing(sequences: tuple[int, ...], layout: Layout, micro_tokens: int, *, sorted_by_length: bool = True) -> Packing:
    """What the trainer's own packing makes of these sequence lengths; tokens are those of one context-parallel rank.

    Args:
        sorted_by_length: neighbouring micro-batches are alike, as this trainer's packing leaves them; else in any order.
    """
    multiple_of = layout.pipeline if layout.virtual_pipeline else 1
    plan = plan_micro_batches(sequences, layout.data, micro_tokens * layout.context, multiple_of)
    sums = [[sum(sequences[i] for i in items) for items in batches] for batches in plan]
    heaviest = max(sums, key=sum)
    sizes = np.array(heaviest if sorted_by_length else np.random.default_rng(0).permutation(heaviest), float)
    windows = [sizes[first : first + layout.pipeline].max() for first in range(len(sizes))]
    return Packing(
        -(-sum(heaviest) // layout.context),
        len(plan[0]),
        -(-max(map(max, sums)) // layout.context),
        float(sum(windows) / sizes.sum()),
    )
