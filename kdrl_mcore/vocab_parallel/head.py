"""The fused output head: from hidden states to log-probs, entropies and a loss, never holding the logits of a micro-batch.

S rows of the sequence, T loss rows, C rows of a chunk, H hidden, V vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk import Kernels
from kdrl_mcore.vocab_parallel.engine import HeadPass
from kdrl_mcore.vocab_parallel.shard import VocabShard

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(log-probs [C], entropies [C], which of the T rows) -> loss of each token [C], differentiable in both."""


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
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `token_loss` over the T rows, with gradients to the hidden states and the weight.

    With p = softmax(h W^T / temperature) over the real columns, `token_loss` gets log p[target] and the entropy of p (nats).
    It is called once for each chunk, in order, and once with empty tensors when T is 0; on every rank of the shard's group it
    must compute the same. Gradients are formed in the forward pass, so one backward pass can follow it.

    Args:
        hidden_SH: hidden states [S, H]; with `sequence_parallel` this rank's S/tp rows of them.
        weight_VH: this rank's rows of the output head, in the type of the hidden states. Logits are formed in that type;
            statistics, loss and dW are added up in float32.
        rows_T: the rows that predict the targets, counted in the whole sequence; no other row reaches the head.
        targets_T: token ids in [0, shard.size).
        chunk_tokens: rows per chunk, the same on every rank; None is `engine.default_chunk_tokens`.
        kernels: what computes a chunk: `torch`; `triton`, for CUDA and types up to float32; `auto` takes Triton where it can.

    Returns:
        (loss, log-probs [T], entropies [T]), float32 (float64 of float64), the same on every rank of the group. The last two
        have no gradient. With no tokens the loss is 0 and its gradient zero.

    Raises:
        ValueError: a target is not a token (on CUDA its log-prob is NaN instead, as a check would wait for the device), shapes
            or types do not fit, or `token_loss` did not return one number per token.

    Collectives over the shard's group: for each chunk a MAX all-reduce of [C] and a SUM all-reduce of [4, C]; under sequence
    parallelism an all-gather of the hidden states; backward a SUM all-reduce of [T, H], under sequence parallelism a
    reduce-scatter of [S, H].
    """
    outputs = HeadPass(
        rows_T,
        targets_T,
        shard,
        temperature,
        sequence_parallel,
        chunk_tokens,
        lambda log_probs_C, entropy_C, _, rows: token_loss(log_probs_C, entropy_C, rows),
        kernels=kernels,
    ).run(hidden_SH, weight_VH)
    return outputs.loss, outputs.log_probs, outputs.entropies


@torch.no_grad()
def head_log_probs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """log p[target] and the entropy of p = softmax(h W^T / temperature), [T] each, without gradient.

    Arguments, errors and collectives are those of `fused_head`'s forward pass.
    """
    head = HeadPass(rows_T, targets_T, shard, temperature, sequence_parallel, chunk_tokens, kernels=kernels)
    outputs = head.run(hidden_SH, weight_VH)
    return outputs.log_probs, outputs.entropies
