"""Draw tokens from vocab-parallel logits without gathering them.

One uniform number per token decides it by inversion of the cumulative distribution, so a sample depends on the seed, the
step and its place in the batch, and not on the layout or on which other sequences are still running.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.vocab_parallel import VocabShard

_MASKED = -1e30


def uniforms(key: tuple[int, ...], sequences: list[int], tokens: int) -> Tensor:
    """Uniform numbers in [0, 1) for each sequence and token [sequences, tokens], float64, each row a function of (key,
    sequence) alone."""
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, sequence]))).random(tokens) for sequence in sequences
    ]
    return torch.from_numpy(np.stack(rows))


def sample(logits_NV: Tensor, uniform_N: Tensor, shard: VocabShard, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits_NV: this rank's columns, float32; overwritten.
        uniform_N: the random number of each row, equal on all ranks.
        temperature: divides the logits; 0 takes the most likely token (its log-prob is that of the unscaled distribution).
        top_p: below 1, sample from the smallest set of tokens whose probability reaches top_p; log-probs are of that
            distribution.

    Returns:
        (token ids [N], log-probs [N], float32) on every rank. Collectives over the shard's group: one all-gather of two
        numbers per row and one SUM all-reduce of two; with top_p < 1 an all-gather of the logits instead.
    """
    if temperature > 0:
        logits_NV /= temperature
    if shard.real_columns < logits_NV.size(1):
        logits_NV[:, shard.real_columns :] = _MASKED
    if top_p < 1 and temperature > 0:
        return _sample_nucleus(_gather_columns(logits_NV, shard), uniform_N, top_p)
    peak_N = logits_NV.amax(dim=1).double()
    # In float64, ranks may each weigh against their own peak: what that rounds is far below what decides a token.
    cumulative_NV = (logits_NV - peak_N[:, None]).exp_().cumsum_(dim=1)
    peak_RN, mass_RN = _gather_rows(torch.stack((peak_N, cumulative_NV[:, -1])), shard).unbind(dim=1)
    top_N = peak_RN.amax(dim=0)
    scale_RN = (peak_RN - top_N).exp()
    edges_RN = (mass_RN * scale_RN).cumsum(dim=0)
    total_N = edges_RN[-1]
    rank = shard.group.rank() if shard.group is not None else 0
    if temperature == 0:
        # Of several ranks (or columns) at the peak, the first one owns the token.
        owner_N = (peak_RN == top_N).double().argmax(dim=0)
        index_N = logits_NV.argmax(dim=1)
    else:
        target_N = uniform_N.to(total_N.device) * total_N
        # Rounding may put the target at the very end: the last rank with any mass then owns it.
        owner_N = (edges_RN <= torch.minimum(target_N, total_N.nextafter(torch.zeros_like(total_N)))).sum(dim=0)
        before_N = edges_RN[rank - 1] if rank else 0.0
        index_N = torch.searchsorted(cumulative_NV, ((target_N - before_N) / scale_RN[rank])[:, None], right=True).squeeze(1)
        index_N = index_N.clamp(max=max(shard.real_columns - 1, 0))
    log_prob_N = logits_NV.gather(1, index_N[:, None]).squeeze(1) - top_N - total_N.log()
    if shard.ranks == 1:
        return index_N, log_prob_N.float()
    answer = torch.where(owner_N == rank, torch.stack((index_N + shard.start, log_prob_N)), 0.0)
    dist.all_reduce(answer, group=shard.group)
    return answer[0].long(), answer[1].float()


def _sample_nucleus(logits_NV: Tensor, uniform_N: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample within the nucleus (https://arxiv.org/abs/1904.09751) of whole rows of logits."""
    log_probs, order = logits_NV.double().log_softmax(dim=1).sort(dim=1, descending=True, stable=True)
    probs = log_probs.exp()
    kept = probs.cumsum(dim=1) - probs < top_p
    cumulative = torch.where(kept, probs, 0.0).cumsum(dim=1)
    mass = cumulative[:, -1]
    target = (uniform_N.to(mass.device) * mass)[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=kept.sum(dim=1, keepdim=True) - 1)
    return order.gather(1, index).squeeze(1), (log_probs.gather(1, index).squeeze(1) - mass.log()).float()


def _gather_rows(value_N: Tensor, shard: VocabShard) -> Tensor:
    """[N] of every rank as [ranks, N]."""
    if shard.group is None or shard.group.size() == 1:
        return value_N[None]
    gathered = value_N.new_empty(shard.group.size() * value_N.size(0), *value_N.shape[1:])
    all_gather_single(gathered, value_N, group=shard.group)
    return gathered.view(shard.group.size(), *value_N.shape)


def _gather_columns(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """The logits of all ranks side by side."""
    parts = _gather_rows(logits_NV.contiguous(), shard)
    return parts.transpose(0, 1).flatten(1)
