"""Draw tokens from vocab-parallel logits without gathering them.

Each token follows from one uniform number by inversion of the cumulative distribution, so a sample depends on the seed, the
step and its position in the batch, and not on the layout or on which other sequences are still running.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.vocab_parallel import Support, VocabShard
from kdrl_mcore.vocab_parallel.collectives import max_over_ranks
from kdrl_mcore.vocab_parallel.logits import MASKED

WHOLE = Support()
_BLOCK = 64  # masses in one sum


def uniforms(key: tuple[int, ...], sequences: list[int], tokens: int) -> Tensor:
    """Uniform numbers in [0, 1) for each sequence and token [sequences, tokens], float64; each row is a function of (key,
    sequence) only."""
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, sequence]))).random(tokens) for sequence in sequences
    ]
    return torch.from_numpy(np.stack(rows))


def sample(
    logits_NV: Tensor,
    uniform_N: Tensor,
    shard: VocabShard,
    temperature: float,
    support: Support = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits_NV: this rank's columns, float32; overwritten.
        uniform_N: the random number of each row, equal on all ranks.
        temperature: divides the logits; 0 selects the most likely token, with its log-prob in the unscaled distribution.
        support: the tokens that may be drawn; log-probs are those of the distribution that is truncated to them. Greedy
            sampling ignores it.

    Returns:
        (token ids [N], log-probs [N], float32) on every rank. Collectives over the shard's group: one all-gather of two
        numbers per row and one SUM all-reduce of two; for a truncated support a MAX all-reduce of one, and those of
        `Support.apply`.
    """
    if temperature not in (0, 1):
        logits_NV /= temperature
    if shard.real_columns < logits_NV.size(1):
        logits_NV[:, shard.real_columns :] = MASKED
    if temperature > 0 and not support.is_whole:
        support.apply(_Columns(logits_NV), max_over_ranks(logits_NV.amax(dim=1), shard), shard)
    peak_N = logits_NV.amax(dim=1)
    # Each rank scales by its own peak. Rounding to float32, like that of the logits, changes one token in millions.
    masses = _Masses((logits_NV - peak_N[:, None]).exp_())
    peak_N = peak_N.double()
    peak_RN, mass_RN = _gather_rows(torch.stack((peak_N, masses.total_N)), shard).unbind(dim=1)
    top_N = peak_RN.amax(dim=0)
    scale_RN = (peak_RN - top_N).exp()
    mass_RN = mass_RN * scale_RN
    total_N = mass_RN.sum(dim=0)
    rank = shard.group.rank() if shard.group is not None else 0
    if temperature == 0:
        # If several ranks (or columns) have the peak, the first one owns the token.
        owner_N = (peak_RN == top_N).double().argmax(dim=0)
        index_N = logits_NV.argmax(dim=1)
    else:
        target_N = uniform_N.to(total_N.device) * total_N
        owner_N, before_N = _locate(mass_RN.T, target_N)
        index_N, _ = masses.locate((target_N - before_N) / scale_RN[rank])
        index_N = index_N.clamp(max=max(shard.real_columns - 1, 0))
    log_prob_N = logits_NV.gather(1, index_N[:, None]).squeeze(1) - top_N - total_N.log()
    if shard.ranks == 1:
        return index_N, log_prob_N.float()
    answer = torch.where(owner_N == rank, torch.stack((index_N + shard.start, log_prob_N)), 0.0)
    dist.all_reduce(answer, group=shard.group)
    return answer[0].long(), answer[1].float()


class _Columns:
    """Logits [N, V] of this rank, in float32, for a `Support`; probabilities are summed in float64."""

    def __init__(self, logits_NV: Tensor) -> None:
        self._logits_NV, self.dtype = logits_NV, logits_NV.dtype
        self._mass_NV: Tensor | None = None

    def count_reaching(self, bound_N: Tensor) -> Tensor:
        return (self._logits_NV >= bound_N[:, None]).sum(dim=1).to(self.dtype)

    def mass_reaching(self, bound_N: Tensor, peak_N: Tensor) -> Tensor:
        if self._mass_NV is None:
            self._mass_NV = (self._logits_NV.double() - peak_N[:, None]).exp_()
        return torch.where(self._logits_NV >= bound_N[:, None], self._mass_NV, 0.0).sum(dim=1)

    def mask_below(self, bound_N: Tensor) -> None:
        self._logits_NV.masked_fill_(self._logits_NV < bound_N[:, None], MASKED)


class _Masses:
    """Unnormalised probabilities [N, V], with a search, in float64, for the column where their running sum passes a number.

    torch has no deterministic prefix sum of floats on CUDA. Here masses are summed by blocks, these sums by blocks again, and
    so on; the search down the levels needs the running sums of only one block per level, which are small matrix products. This
    also moves less memory: the masses are read once, and nothing of their size (156 MB for 128 rows of 152,000 columns) is
    written.
    """

    def __init__(self, mass_NV: Tensor) -> None:
        self._levels: list[Tensor] = []  # [N, blocks, columns of a block], from one block up to all masses
        while True:
            rows, columns = mass_NV.shape
            if columns > _BLOCK and columns % _BLOCK:
                mass_NV = F.pad(mass_NV, (0, -columns % _BLOCK))
            level = mass_NV.view(rows, -1, min(_BLOCK, columns))
            self._levels.insert(0, level)
            mass_NV = level.sum(dim=2).double()
            if mass_NV.size(1) == 1:
                break
        self.total_N = mass_NV.squeeze(1)

    def locate(self, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """The first column at which the running sum exceeds the target, and the sum of the columns before it."""
        rows_N = torch.arange(len(target_N), device=target_N.device)
        index_N, before_N = torch.zeros_like(rows_N), torch.zeros_like(target_N)
        for level in self._levels:
            inside_N, more_N = _locate(level[rows_N, index_N].double(), target_N - before_N)
            index_N, before_N = index_N * level.size(2) + inside_N, before_N + more_N
        return index_N, before_N


def _locate(mass_NK: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry of each row at which the running sum exceeds the target, and the sum of the entries before it.

    Despite rounding it is always an entry with mass: the first for targets below zero, the last for targets beyond the total.
    """
    columns = mass_NK.size(1)
    sum_NK = mass_NK @ torch.ones(columns, columns, dtype=mass_NK.dtype, device=mass_NK.device).triu()
    reached_NK = torch.where(mass_NK > 0, sum_NK, 0.0)
    largest_N = reached_NK.amax(dim=1)
    target_N = torch.minimum(target_N, largest_N.nextafter(torch.zeros_like(largest_N))).clamp(min=0.0)
    index_N = (reached_NK > target_N[:, None]).byte().argmax(dim=1)
    return index_N, (sum_NK - mass_NK).gather(1, index_N[:, None]).squeeze(1)


def _gather_rows(value_N: Tensor, shard: VocabShard) -> Tensor:
    """The values [N] of every rank as [ranks, N]. Collective over the shard's group: an all-gather."""
    if shard.group is None or shard.group.size() == 1:
        return value_N[None]
    gathered = value_N.new_empty(shard.group.size() * value_N.size(0), *value_N.shape[1:])
    all_gather_single(gathered, value_N, group=shard.group)
    return gathered.view(shard.group.size(), *value_N.shape)
