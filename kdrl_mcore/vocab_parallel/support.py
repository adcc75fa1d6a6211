"""The support of pi: the tokens that are left of a distribution by top_p, top_k and min_p, across tensor-parallel ranks.

As in vLLM, the logits are divided by the temperature, then min_p, top_k and top_p each leave some tokens of what is left by the
one before. What is left are always the tokens whose logits reach a bound, one number for each row, which is found by bisection:
nothing is sorted or gathered, and every rank masks its own columns.

C rows, V vocabulary columns of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdrl_mcore.types import OUTSIDE
from kdrl_mcore.vocab_parallel.collectives import sum_over_ranks
from kdrl_mcore.vocab_parallel.logits import MASKED
from kdrl_mcore.vocab_parallel.shard import VocabShard

assert MASKED < OUTSIDE  # the log-prob of a masked logit

_LEAST = MASKED / 8  # below every logit of a token, above those of masked columns
_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Logits(Protocol):
    """Logits of this rank, [C, V], of which a bound leaves some. No method communicates."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision to which the logits are rounded, though they may be held in a higher one."""
        ...

    def count_reaching(self, bound_C: Tensor) -> Tensor:
        """How many logits of each row are at least the bound, [C] in floating point."""
        ...

    def mass_reaching(self, bound_C: Tensor, peak_C: Tensor) -> Tensor:
        """The sum of exp(logit - peak) over the logits of each row that are at least the bound, [C]."""
        ...

    def mask_below(self, bound_C: Tensor) -> None:
        """Set the logits below the bound to `MASKED`."""
        ...


@dataclass(frozen=True)
class Support:
    """Which tokens are left, as the rollout engines sample them.

    Attributes:
        top_p: the smallest number of the likeliest tokens whose probabilities, among what min_p and top_k leave, sum to this
            (https://arxiv.org/abs/1904.09751); 1 is off.
        top_k: this many of the likeliest tokens; 0 is off.
        min_p: tokens with at least this share of the likeliest one's probability (https://arxiv.org/abs/2407.01082); 0 is off.

    Of equal logits at the bound all are left, so the support does not depend on the layout.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether all tokens are left."""
        return self.top_p >= 1 and self.top_k == 0 and self.min_p == 0

    def apply(self, logits: Logits, peak_C: Tensor, shard: VocabShard) -> None:
        """Mask the logits of tokens outside the support, in place.

        Args:
            peak_C: each row's largest logit over all ranks, in at least float32.

        Collectives over the shard's group: for top_k, and for top_p, at most one SUM all-reduce of [C] for each bit of the
        logits' precision, and for top_p one more. On CUDA the host does not wait for the device.
        """
        if self.is_whole:
            return
        bound_C = torch.full_like(peak_C, _LEAST)
        if self.min_p > 0:
            bound_C = peak_C + math.log(self.min_p)
        if 0 < self.top_k < shard.size:
            bound_C = torch.maximum(bound_C, self._top_k_bound(logits, peak_C, shard))
        if self.top_p < 1:
            bound_C = self._top_p_bound(logits, peak_C, bound_C, shard)
        logits.mask_below(bound_C)

    def _top_k_bound(self, logits: Logits, peak_C: Tensor, shard: VocabShard) -> Tensor:
        """The k-th largest logit of each row."""

        def holds(bound_C: Tensor) -> Tensor:
            return sum_over_ranks(logits.count_reaching(bound_C), shard) >= self.top_k

        return _largest_bound(holds, torch.full_like(peak_C, _LEAST), peak_C, logits.dtype)

    def _top_p_bound(self, logits: Logits, peak_C: Tensor, bound_C: Tensor, shard: VocabShard) -> Tensor:
        """The smallest logit of the nucleus, among those that reach `bound_C`."""
        needed_C = self.top_p * sum_over_ranks(logits.mass_reaching(bound_C, peak_C), shard)

        def holds(bound_C: Tensor) -> Tensor:
            return sum_over_ranks(logits.mass_reaching(bound_C, peak_C), shard) >= needed_C

        # If every token below a bound has less than (1 - top_p) / V of the likeliest one's probability, they are not needed.
        low_C = peak_C + (math.log1p(-self.top_p) - math.log(shard.size) - 1.0)
        found_C = _largest_bound(holds, torch.maximum(bound_C, low_C), peak_C, logits.dtype)
        return torch.maximum(bound_C, found_C)


def _largest_bound(holds: Callable[[Tensor], Tensor], low_C: Tensor, high_C: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` between `low_C` and `high_C` for which `holds` is true, given that it is true at and below
    some number that is at least `low_C`, and false above it: [C].

    It bisects the numbers' bits, read as integers, so it is exact after as many steps as they have bits.
    """
    low, high = _ordered(low_C.to(dtype)), _ordered(high_C.to(dtype))
    for _ in range(torch.finfo(dtype).bits):
        if low.device.type == "cpu" and torch.equal(low, high):
            break
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        inside = holds(_number(middle, dtype).to(high_C.dtype))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle - 1)
    return _number(low, dtype).to(high_C.dtype)


def _ordered(numbers: Tensor) -> Tensor:
    """Integers (int64) in the order of the numbers: their bits, with those of a negative number's magnitude inverted."""
    dtype = _INTEGERS[numbers.dtype]
    bits = numbers.view(dtype).long()
    return bits ^ ((bits >> 63) & torch.iinfo(dtype).max)


def _number(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_ordered`."""
    integer = _INTEGERS[dtype]
    return (ordered ^ ((ordered >> 63) & torch.iinfo(integer).max)).to(integer).view(dtype)
