"""Differentiable log-probs and entropy of existing logits, for small problems and for models that return logits.

T tokens, V vocabulary columns of this rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdrl_mcore.vocab_parallel.collectives import max_over_ranks, sum_over_ranks
from kdrl_mcore.vocab_parallel.shard import VocabShard

MASKED = -1e30
"""The largest logit of a rank without real columns. It is finite, since 0 * infinity would be NaN."""
COUNTS_BYTES = 16 * 2**20
"""The memory for the counts of equal logits at a time."""


def token_log_probs_and_entropy(
    logits_TV: Tensor, targets_T: Tensor, shard: VocabShard, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p[target] and the entropy -sum_v p_v log p_v of p = softmax(logits / temperature), in nats.

    The whole [T, V] stays in memory, unlike in `fused_head`. The input is never overwritten. Columns beyond the real vocabulary
    are ignored and get zero gradient.

    Args:
        logits_TV: this rank's columns.
        targets_T: token ids in [0, shard.size), the same on every rank of the group.

    Returns:
        (log-probs [T], entropy [T]), float32 (float64 for float64 logits), the same on every rank of the group. Both are
        differentiable: d log p_t / dz_v = 1[v = t] - p_v, dH / dz_v = -p_v (log p_v + H), where z = logits / temperature.

    Raises:
        ValueError: a target is not a token (on CUDA its log-prob is NaN instead), or shapes do not fit.

    Collectives over the shard's group: a MAX all-reduce of [T] and a SUM all-reduce of [4, T]; none in the backward pass, since
    the outputs' gradients are the same on every rank.
    """
    if logits_TV.shape != (len(targets_T), shard.stop - shard.start):
        raise ValueError(
            f"logits of shape {tuple(logits_TV.shape)} do not fit {len(targets_T)} targets and the columns "
            f"{shard.start} to {shard.stop} of the shard"
        )
    shard.check_targets(targets_T)
    log_probs_T, entropy_T = _LogProbsAndEntropy.apply(logits_TV, targets_T, shard, temperature)
    return log_probs_T, entropy_T


def local_peak(logits_CV: Tensor) -> Tensor:
    """The largest logit of each row; `MASKED` if there are no columns."""
    if logits_CV.size(1) == 0:
        return logits_CV.new_full((logits_CV.size(0),), MASKED)
    return logits_CV.amax(dim=1)


def largest_logits(logits_CV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the `count` largest logits of each row in descending order, their columns), [C, count] each; which of equal logits it
    returns is not specified.

    It is `torch.topk` on few candidates: of D interleaved parts of a row's columns, column j of each forms a group, and the
    largest logits are in the groups with the largest maxima. One read of the logits, where `topk` itself takes several, or on
    CPU a copy of each row.
    """
    columns = logits_CV.size(1)
    parts = math.isqrt(columns // count)
    if parts < 2:
        return logits_CV.topk(count, dim=1)
    groups = columns // parts
    maxima_CJ = logits_CV[:, : parts * groups].unflatten(1, (parts, groups)).amax(dim=1)
    group_CK = maxima_CJ.topk(count, dim=1, sorted=False).indices
    first_D = torch.arange(0, parts * groups, groups, device=logits_CV.device)
    rest_M = torch.arange(parts * groups, columns, device=logits_CV.device)
    column_CM = torch.cat(((group_CK[:, None] + first_D[:, None]).flatten(1), rest_M.expand(len(logits_CV), -1)), dim=1)
    values_CK, place_CK = logits_CV.gather(1, column_CM).topk(count, dim=1)
    return values_CK, column_CM.gather(1, place_CK)


def local_top_k(logits_CV: Tensor, top_k: int) -> Tensor:
    """The columns [C, min(top_k, V)] of the largest logits, in descending order; among equal logits the lower column comes
    first. Does not wait for a device."""
    top_k = min(top_k, logits_CV.size(1))
    if top_k == 0 or len(logits_CV) == 0:
        return torch.empty(len(logits_CV), top_k, dtype=torch.long, device=logits_CV.device)
    if logits_CV.device.type == "cpu":
        return _top_k_on_host(logits_CV, top_k)
    rows = max(1, COUNTS_BYTES // (4 * logits_CV.size(1)))
    return torch.cat([_top_k_of_rows(block_CV, top_k) for block_CV in logits_CV.split(rows)])


def _top_k_on_host(logits_CV: Tensor, top_k: int) -> Tensor:
    """Only rows in which the threshold stands on both sides of the cut are read again."""
    values_CM, column_CM = largest_logits(logits_CV, min(top_k + 1, logits_CV.size(1)))
    column_CK = column_CM[:, :top_k].clone()
    threshold_C1 = values_CM[:, top_k - 1 : top_k]
    # "Neither above nor below" rather than "equal": a row of NaN keeps its first columns, and its loss shows the NaN.
    tied_N = (values_CM[:, top_k:] < threshold_C1).logical_not().any(dim=1).nonzero().squeeze(1)
    above_C = (values_CM > threshold_C1).sum(dim=1)
    for tied_B in tied_N.split(max(1, COUNTS_BYTES // (32 * logits_CV.size(1)))):
        logits_BV, threshold_B1 = logits_CV[tied_B], threshold_C1[tied_B]
        unequal_BV = (logits_BV < threshold_B1).logical_or_(logits_BV > threshold_B1)
        row_E, equal_E = unequal_BV.logical_not_().nonzero(as_tuple=True)
        counts_B = row_E.bincount(minlength=len(tied_B))
        place_E = torch.arange(len(row_E)) - (counts_B.cumsum(0) - counts_B)[row_E] + above_C[tied_B][row_E]
        kept_E = place_E < top_k
        column_CK[tied_B[row_E[kept_E]], place_E[kept_E]] = equal_E[kept_E]
    column_CK = column_CK.sort(dim=1).values
    order_CK = logits_CV.gather(1, column_CK).sort(dim=1, descending=True, stable=True).indices
    return column_CK.gather(1, order_CK)


def _top_k_of_rows(logits_CV: Tensor, top_k: int) -> Tensor:
    """The columns above the threshold, the smallest of the largest logits, and the first ones equal to it: the same number in
    each row, so nothing waits for the device."""
    values_CK, _ = largest_logits(logits_CV, top_k)
    threshold_C1 = values_CK.amin(dim=1, keepdim=True)
    above_CV = logits_CV > threshold_C1
    equal_CV = (logits_CV < threshold_C1).logical_or_(above_CV).logical_not_()
    missing_C1 = top_k - above_CV.sum(dim=1, keepdim=True)
    chosen_CV = above_CV.logical_or_(equal_CV.logical_and_(equal_CV.cumsum(dim=1, dtype=torch.int32) <= missing_C1))
    column_CK = torch.nonzero_static(chosen_CV, size=values_CK.numel())[:, 1].view(values_CK.shape)
    order_CK = logits_CV.gather(1, column_CK).sort(dim=1, descending=True, stable=True).indices
    return column_CK.gather(1, order_CK)


def local_target(centred_CV: Tensor, targets_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(the targets' logits [C], 1.0 where this rank holds the target and 0.0 elsewhere [C]); the logit is 0 elsewhere."""
    own_C, column_C = shard.locate(targets_C)
    held_C = own_C.to(centred_CV.dtype)
    if centred_CV.size(1) == 0:
        return held_C, held_C
    return torch.where(own_C, centred_CV.gather(1, column_C[:, None]).squeeze(1), 0.0), held_C


def known_or_nan(log_probs_C: Tensor, holders_C: Tensor) -> Tensor:
    """The log-probs, or NaN where no rank held the target."""
    return torch.where(holders_C > 0, log_probs_C, torch.nan)


class _LogProbsAndEntropy(torch.autograd.Function):
    """Keeps the logits themselves for the backward pass, and two numbers per token."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, shard: VocabShard, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        centred_TV = _scaled(logits_TV, shard, temperature)
        peak_T = max_over_ranks(local_peak(centred_TV), shard)
        centred_TV.sub_(peak_T[:, None])
        weights_TV = centred_TV.exp()
        target_T, held_T = local_target(centred_TV, targets_T, shard)
        total_T, product_T, target_T, holders_T = sum_over_ranks(
            torch.stack((weights_TV.sum(dim=1), weights_TV.mul_(centred_TV).sum(dim=1), target_T, held_T)), shard
        )
        log_total_T = total_T.log()
        entropy_T = log_total_T - product_T / total_T
        ctx.save_for_backward(logits_TV, targets_T, peak_T, log_total_T, entropy_T)
        ctx.shard, ctx.temperature = shard, temperature
        return known_or_nan(target_T - log_total_T, holders_T), entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_T: Tensor | None, h_T: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if g_T is None and h_T is None:
            return None, None, None, None
        logits_TV, targets_T, peak_T, log_total_T, entropy_T = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        log_p_TV = _scaled(logits_TV, shard, ctx.temperature).sub_(peak_T[:, None]).sub_(log_total_T[:, None])
        d_TV = log_p_TV.exp()
        if h_T is None:
            assert g_T is not None
            d_TV.mul_(-g_T[:, None])
        else:
            factor_TV = log_p_TV.add_(entropy_T[:, None]).mul_(-h_T[:, None])
            d_TV.mul_(factor_TV if g_T is None else factor_TV.sub_(g_T[:, None]))
        if g_T is not None and shard.real_columns:
            own_T, column_T = shard.locate(targets_T)
            d_TV.scatter_add_(1, column_T[:, None], torch.where(own_T, g_T, 0.0)[:, None])
        gradient_TV = torch.zeros_like(logits_TV)
        torch.div(d_TV, ctx.temperature, out=d_TV)
        gradient_TV[:, : shard.real_columns].copy_(d_TV)
        return gradient_TV, None, None, None


def _scaled(logits_TV: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """A copy of the real columns divided by the temperature, in at least float32."""
    real_TV = logits_TV[:, : shard.real_columns]
    return real_TV.to(torch.promote_types(logits_TV.dtype, torch.float32), copy=True).div_(temperature)
