"""Draw tokens from vocab-parallel logits without gathering them.

Each token follows from one uniform number by inversion of the cumulative distribution, so a sample depends on the seed, the
step and its position in the batch, and not on the layout or on which other sequences are still running.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.vocab_parallel import VocabShard

_MASKED = -1e30
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
    top_p: float,
    top_k: int = 0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits_NV: this rank's columns, float32; overwritten.
        uniform_N: the random number of each row, equal on all ranks.
        temperature: divides the logits; 0 selects the most likely token, with its log-prob in the unscaled distribution.
        top_p: below 1, sample from the smallest set of tokens whose probability reaches top_p.
        top_k: above 0, sample among this many of the likeliest tokens.
        min_p: above 0, sample among tokens with at least this share of the likeliest one's probability. As in vLLM, min_p comes
            first, then top_k, then top_p of the remaining tokens. Log-probs are those of the truncated distribution.

    Returns:
        (token ids [N], log-probs [N], float32) on every rank. Collectives over the shard's group: one all-gather of two
        numbers per row and one SUM all-reduce of two; if the distribution is truncated, an all-gather of the logits instead.
    """
    if temperature not in (0, 1):
        logits_NV /= temperature
    if shard.real_columns < logits_NV.size(1):
        logits_NV[:, shard.real_columns :] = _MASKED
    if temperature > 0 and (top_p < 1 or top_k > 0 or min_p > 0):
        return _sample_truncated(_gather_columns(logits_NV, shard), uniform_N, top_p, top_k, min_p)
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


def _sample_truncated(logits_NV: Tensor, uniform_N: Tensor, top_p: float, top_k: int, min_p: float) -> tuple[Tensor, Tensor]:
    """Sample among the likeliest tokens of whole rows of logits: the nucleus (https://arxiv.org/abs/1904.09751) of the top_k
    likeliest and of those that min_p (https://arxiv.org/abs/2407.01082) keeps."""
    log_probs, order = logits_NV.double().log_softmax(dim=1).sort(dim=1, descending=True, stable=True)
    if min_p > 0:
        log_probs = log_probs.masked_fill(log_probs < log_probs[:, :1] + math.log(min_p), -math.inf)
    if top_k > 0:
        log_probs[:, top_k:] = -math.inf
    if min_p > 0 or top_k > 0:
        log_probs = log_probs.log_softmax(dim=1)
    masses = _Masses(log_probs.exp())
    # The nucleus ends with the first token at which the sum is no longer below top_p.
    below = torch.full_like(uniform_N, np.nextafter(top_p, 0.0), device=log_probs.device)
    last_N, before_N = masses.locate(below)
    kept_N = before_N + log_probs.gather(1, last_N[:, None]).squeeze(1).exp()
    index_N, _ = masses.locate(uniform_N.to(kept_N.device) * kept_N)
    index = torch.minimum(index_N, last_N)[:, None]
    return order.gather(1, index).squeeze(1), (log_probs.gather(1, index).squeeze(1) - kept_N.log()).float()


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


def _gather_columns(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """The logits of all ranks side by side. Collective over the shard's group: an all-gather."""
    parts = _gather_rows(logits_NV.contiguous(), shard)
    return parts.transpose(0, 1).flatten(1)
