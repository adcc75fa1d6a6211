"""The fused output head: from hidden states to log-probs, entropies and a loss, at the memory of one chunk of logits.

The loss is a sum over tokens, so each chunk of tokens can be finished at once: logits, log-probs, the caller's loss of each
token, the gradient of that small vector, the gradient of the logits in their own buffer, and from it the chunk's part of dX
and dW. Nothing is
recomputed: 6*T*H*V/tp FLOP for loss and gradients, 2*T*H*V/tp for scoring.

S rows of the sequence, T loss rows, C rows of a chunk, H hidden, V vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.vocab_parallel.shard import VocabShard

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(log-probs [C], entropies [C], which of the T rows) -> loss of each token [C], differentiable in both."""

CHUNK_BYTES = 64 * 2**20
MASKED = -1e30  # large and finite: 0 * inf would be NaN


def chunk_rows(columns: int) -> int:
    """Rows per chunk: as many as keep a float32 chunk of logits within `CHUNK_BYTES`, at least 128."""
    return max(128, CHUNK_BYTES // (4 * max(columns, 1)))


def head_log_probs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T / temperature)[target] and the entropy of that distribution, [T] each, float32. No gradient.

    Args:
        hidden_SH: hidden states, or this rank's share of the rows under sequence parallelism.
        rows_T: the rows that predict the targets, counted in the whole sequence; no other row reaches the head.

    Collectives over the shard's group, for each chunk: a MAX all-reduce of [C] and a SUM all-reduce of [3, C]; under
    sequence parallelism one all-gather of the hidden states.
    """
    with torch.no_grad():
        hidden_SH = _gather_sequence(hidden_SH, shard) if sequence_parallel else hidden_SH
        chunks = [chunk for _, chunk in _chunks(hidden_SH, weight_VH, rows_T, targets_T, shard, temperature)]
        empty = hidden_SH.new_empty(0, dtype=torch.float32)
        return torch.cat([empty, *(c.log_prob_C for c in chunks)]), torch.cat([empty, *(c.entropy_C for c in chunks)])


def fused_head(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    token_loss: TokenLoss,
    shard: VocabShard,
    *,
    temperature: float,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `token_loss` over the T rows, with gradients to the hidden states and the weight.

    `token_loss` is called once for each chunk, and once with empty tensors when T is 0; every rank of the shard's group
    calls it with the same values.

    Args: as for `head_log_probs`.

    Returns:
        (loss, log-probs [T], entropies [T]); the last two without gradient. The loss is the same on every rank of the group.

    Collectives over the shard's group: those of `head_log_probs`, and in the backward pass one SUM all-reduce of the hidden
    states' gradient (a reduce-scatter under sequence parallelism).
    """
    loss, log_probs, entropy = _FusedHead.apply(
        hidden_SH, weight_VH, rows_T, targets_T, token_loss, shard, temperature, sequence_parallel
    )
    return loss, log_probs, entropy


class _FusedHead(torch.autograd.Function):
    """Forms dX and dW in the forward pass; backward multiplies them by the incoming gradient and sums dX over the group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        rows_T: Tensor,
        targets_T: Tensor,
        token_loss: TokenLoss,
        shard: VocabShard,
        temperature: float,
        sequence_parallel: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        whole_SH = _gather_sequence(hidden_SH, shard) if sequence_parallel else hidden_SH
        d_hidden_SH = torch.zeros_like(whole_SH)
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        log_probs, entropies = [], []
        for rows, chunk in _chunks(whole_SH, weight_VH, rows_T, targets_T, shard, temperature, at_least_one=True):
            with torch.enable_grad():
                log_prob_C = chunk.log_prob_C.detach().requires_grad_()
                entropy_C = chunk.entropy_C.detach().requires_grad_()
                value = token_loss(log_prob_C, entropy_C, rows).sum()
            g_C, h_C = torch.autograd.grad(value, (log_prob_C, entropy_C), allow_unused=True)
            loss += value.detach()
            log_probs.append(chunk.log_prob_C)
            entropies.append(chunk.entropy_C)
            if (g_C is None and h_C is None) or len(targets_T) == 0:
                continue
            d_logits_CV = chunk.logits_gradient(g_C, h_C, shard, temperature).to(whole_SH.dtype)
            d_hidden_SH.index_add_(0, rows_T[rows], d_logits_CV @ weight_VH)
            if d_weight_VH.dtype == d_logits_CV.dtype:
                d_weight_VH.addmm_(d_logits_CV.T, chunk.hidden_CH)
            else:
                d_weight_VH += d_logits_CV.T @ chunk.hidden_CH
        ctx.save_for_backward(d_hidden_SH, d_weight_VH.to(weight_VH.dtype))
        ctx.shard, ctx.sequence_parallel = shard, sequence_parallel
        outputs = loss, torch.cat(log_probs), torch.cat(entropies)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_SH, d_weight_VH = ctx.saved_tensors
        scale = gradients[0]
        d_hidden_SH = d_hidden_SH * scale
        if ctx.sequence_parallel:
            d_hidden_SH = _reduce_scatter_sequence(d_hidden_SH, ctx.shard)
        elif ctx.shard.ranks > 1:
            dist.all_reduce(d_hidden_SH, group=ctx.shard.group)
        return d_hidden_SH, d_weight_VH * scale, None, None, None, None, None, None


@dataclass
class _Chunk:
    """One chunk of rows, its softmax statistics known: `weights_CV` holds exp(z - peak), peak over all ranks."""

    hidden_CH: Tensor
    weights_CV: Tensor
    peak_C: Tensor
    total_C: Tensor
    log_prob_C: Tensor
    entropy_C: Tensor
    own_C: Tensor
    column_C: Tensor

    def logits_gradient(self, g_C: Tensor | None, h_C: Tensor | None, shard: VocabShard, temperature: float) -> Tensor:
        """dL/dlogits in the buffer of the weights, from dL/dlog-prob and dL/dentropy. No communication.

        d log p_t / dz_v = 1[v = t] - p_v and dH / dz_v = -p_v (log p_v + H); the logits are z * temperature.
        """
        inverse_C = 1.0 / self.total_C
        d_CV = self.weights_CV
        if h_C is None:
            assert g_C is not None
            d_CV *= (-g_C * inverse_C / temperature)[:, None]
        else:
            log_p_CV = d_CV.clamp_min(torch.finfo(d_CV.dtype).tiny).log_().sub_(self.total_C.log()[:, None])
            factor_CV = log_p_CV.add_(self.entropy_C[:, None]).mul_(-h_C[:, None])
            if g_C is not None:
                factor_CV -= g_C[:, None]
            d_CV *= factor_CV.mul_((inverse_C / temperature)[:, None])
        if g_C is not None and d_CV.size(1):
            target = torch.where(self.own_C, g_C / temperature, 0.0)
            d_CV.scatter_add_(1, self.column_C[:, None], target[:, None])
        return d_CV


def _chunks(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    shard: VocabShard,
    temperature: float,
    at_least_one: bool = False,
) -> Iterator[tuple[slice, _Chunk]]:
    """Each chunk of loss rows with its softmax statistics. Collectives: two all-reduces over the shard's group for each."""
    size, total = chunk_rows(weight_VH.size(0)), len(rows_T)
    for start in range(0, max(total, int(at_least_one)), size):
        rows = slice(start, min(start + size, total))
        hidden_CH = hidden_SH[rows_T[rows]]
        logits_CV = (hidden_CH @ weight_VH.T).float()
        logits_CV *= 1.0 / temperature
        logits_CV[:, shard.real_columns :] = MASKED
        peak_C = logits_CV.amax(dim=1)
        if shard.ranks > 1:
            dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=shard.group)
        column_C = targets_T[rows] - shard.start
        own_C = (column_C >= 0) & (column_C < logits_CV.size(1))
        column_C = torch.where(own_C, column_C, 0)
        logits_CV -= peak_C[:, None]
        target_C = torch.where(own_C, logits_CV.gather(1, column_C[:, None]).squeeze(1), 0.0)
        weights_CV = logits_CV.exp()
        # sum of exp(z) * z: the masked columns weigh nothing, but 0 * MASKED is only 0 because MASKED is finite
        mean_C = torch.linalg.vecdot(weights_CV, logits_CV)
        sums = torch.stack((weights_CV.sum(dim=1), mean_C, target_C))
        if shard.ranks > 1:
            dist.all_reduce(sums, group=shard.group)
        total_C = sums[0]
        log_total_C = total_C.log()
        yield (
            rows,
            _Chunk(
                hidden_CH=hidden_CH,
                weights_CV=weights_CV,
                peak_C=peak_C,
                total_C=total_C,
                log_prob_C=sums[2] - log_total_C,
                entropy_C=log_total_C - sums[1] / total_C,
                own_C=own_C,
                column_C=column_C,
            ),
        )


def _gather_sequence(hidden_SH: Tensor, shard: VocabShard) -> Tensor:
    """The rows of all ranks, in rank order."""
    whole = hidden_SH.new_empty(hidden_SH.size(0) * shard.ranks, hidden_SH.size(1))
    dist.all_gather_into_tensor(whole, hidden_SH.contiguous(), group=shard.group)
    return whole


def _reduce_scatter_sequence(gradient_SH: Tensor, shard: VocabShard) -> Tensor:
    """This rank's rows of the sum over ranks."""
    part = gradient_SH.new_empty(gradient_SH.size(0) // shard.ranks, gradient_SH.size(1))
    dist.reduce_scatter_tensor(part, gradient_SH.contiguous(), group=shard.group)
    return part
