"""The work of a step that the configuration does not determine: the lengths and the correctness of responses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.config import Config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.layout import Layout
from kdrl_mcore.parallel.micro_batches import Shape, plan_micro_batches
from kdrl_mcore.parallel.packing import num_rows

MEAN_SHARE = 0.5
"""The mean response length if none is given, as a share of the longest allowed one."""


@dataclass(frozen=True)
class Workload:
    """The responses of one training step.

    Attributes:
        responses: their number N.
        prompt_tokens: the mean length of a prompt.
        response_tokens: the mean length of a response.
        longest: the length of the longest response.
        correct: the share of correct responses, which a mask excludes from distillation.
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
        """Response lengths [N], the longest first, spread evenly around the mean as far as the limits allow."""
        low = max(1, 2 * self.response_tokens - self.longest)
        high = 2 * self.response_tokens - low
        lengths = np.linspace(high, low, self.responses).round().astype(np.int64)
        lengths[0] = self.longest
        return lengths

    @property
    def tokens(self) -> int:
        """The number of tokens in all sequences."""
        return int(self.lengths_N.sum()) + self.responses * self.prompt_tokens

    def rows(self, sharing: int) -> int:
        """The number of rows that training and scoring compute if `sharing` responses share those of their prompt."""
        return self.tokens - self._spared(sharing) * self.prompt_tokens

    def attended(self, sharing: int) -> float:
        """The mean number of tokens that precede a row's in its sequence."""
        totals = (self.lengths_N + self.prompt_tokens).astype(float)
        spared = self._spared(sharing) * float(self.prompt_tokens) ** 2
        return float(((totals**2).sum() - spared) / self.rows(sharing) / 2)

    def _spared(self, sharing: int) -> int:
        """The number of prompts that share the rows of another one."""
        return self.responses - -(-self.responses // sharing)

    def share(self, parts: int) -> NDArray[np.int64]:
        """The response lengths of the part with the longest response, if responses are dealt to the parts in turn."""
        return self.lengths_N[::parts]

    def shapes(self, sharing: int) -> tuple[Shape, ...]:
        """The sequences; those that share a prompt are spread over all lengths."""
        prompts = -(-self.responses // sharing)
        return tuple(
            Shape(index, self.prompt_tokens, length, index % prompts if sharing > 1 else None)
            for index, length in enumerate(self.lengths_N.tolist())
        )


def workload_of(
    config: Config,
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    correct: float = 0.6,
) -> Workload:
    """The batch of the configuration; what it does not determine is given or assumed."""
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
    """The micro-batches of the most loaded data-parallel rank.

    Attributes:
        tokens: the number of its tokens.
        micro_batches: the number of micro-batches on every rank.
        largest: the number of tokens in the largest micro-batch.
        stall: the factor by which a pipeline slows down because its stages, working on neighbouring micro-batches, wait for
            the longest of them.
    """

    tokens: int
    micro_batches: int
    largest: int
    stall: float


@cache
def packing(shapes: tuple[Shape, ...], layout: Layout, micro_tokens: int, *, sorted_by_length: bool = True) -> Packing:
    """The trainer's packing of these sequences; tokens are those of one context-parallel rank.

    Args:
        sorted_by_length: neighbouring micro-batches have similar lengths, as with this trainer's packing; otherwise they are
            in random order.
    """
    multiple_of = layout.pipeline if layout.virtual_pipeline else 1
    plan = plan_micro_batches(shapes, layout.data, micro_tokens * layout.context, multiple_of)
    sums = [[num_rows([shapes[i] for i in items]) for items in batches] for batches in plan]
    heaviest = max(sums, key=sum)
    sizes = np.array(heaviest if sorted_by_length else np.random.default_rng(0).permutation(heaviest), float)
    windows = [sizes[first : first + layout.pipeline].max() for first in range(len(sizes))]
    return Packing(
        -(-sum(heaviest) // layout.context),
        len(plan[0]),
        -(-max(map(max, sums)) // layout.context),
        float(sum(windows) / sizes.sum()),
    )
