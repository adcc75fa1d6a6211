"""The fused output head: from hidden states to log-probs, entropies, a divergence from a teacher and a loss, without ever
holding the logits of a whole micro-batch.

S rows of the sequence, T loss rows, the first D of them with a teacher, C rows of a chunk, H hidden, V vocabulary columns of
this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk import Kernels, TokenLoss
from kdrl_mcore.vocab_parallel.divergence import TeacherSide
from kdrl_mcore.vocab_parallel.engine import HeadOutputs, HeadPass
from kdrl_mcore.vocab_parallel.shard import VocabShard
from kdrl_mcore.vocab_parallel.support import Support


def fused_head(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    token_loss: TokenLoss,
    shard: VocabShard,
    *,
    temperature: float,
    adapter_VR: Tensor | None = None,
    teacher: TeacherSide | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
    support: Support | None = None,
) -> HeadOutputs:
    """The sum of `token_loss` over the T rows, with gradients to the hidden states and the weight.

    With p = softmax(h W^T / temperature) over the real columns, and q the teacher's distribution likewise, `token_loss` gets
    log p[target], the entropy of p, a divergence between p and q, and log q[target] (nats; see `HeadTokens`). So one pass
    computes the joint loss of KDRL (arXiv 2506.02208): alpha * L_GRPO of the log-probs plus beta * L_KD of the divergence.

    `token_loss` is called once for each chunk, in order, and once with empty tensors if T is 0; it must return the same on
    every rank of the shard's group. Gradients are computed in the forward pass, so only one backward pass can follow it.

    The cost is 6*H FLOP per token and column, and 2*G more with a teacher of hidden size G. The teacher's logits are never
    stored or sent, and get no gradient.

    Args:
        hidden_SH: hidden states [S, H]; with `sequence_parallel`, this rank's S/tp rows of them.
        weight_VH: this rank's rows of the output head, in the type of the hidden states. Logits are computed in that type;
            statistics, loss and dW are accumulated in float32.
        rows_T: the rows that predict the targets, as indices into the whole sequence; no other row reaches the head.
        targets_T: token ids in [0, shard.size).
        adapter_VR: this rank's rows of LoRA's B, for a frozen weight: h W^T becomes [h, l] [W, B]^T, where the hidden states
            [S, H + R] end in l, the scaled product of h and A. B alone gets a gradient; a copy of [W, B] exists meanwhile.
        teacher: the teacher of the first D rows, the divergence (one of this package's), and whether its entropy is wanted.
        chunk_tokens: rows per chunk, the same on every rank; None means `engine.default_chunk_tokens`.
        kernels: what computes a chunk: `torch`; `triton`, for CUDA and types up to float32; `auto` uses Triton where possible.
        support: p is truncated to it and renormalised; which tokens are left is not differentiated. The log-prob of a target
            outside is below `support.OUTSIDE` and its gradient is of no use: the loss must not depend on it.

    Returns:
        Loss, log-probs, entropies, divergences, the teacher's log-probs of the targets and, if asked for, its entropies, in
        float32 (float64 for float64 inputs), the same on every rank of the group. Only the loss has a gradient. Without tokens,
        loss and gradient are zero.

    Raises:
        ValueError: a target is not a token (on CUDA its log-prob is NaN instead, as a check would wait for the device), shapes
            or types do not fit, `token_loss` did not return one number per token, or the divergence does not fit the
            vocabulary, or, with a truncated support, is not `ExactReverseKL`.

    Collectives over the shard's group: for each chunk a MAX all-reduce of [C] and a SUM all-reduce of [4, C], or with a teacher
    of [2, C] and [6, C] (with its entropy [7, C]) plus what its divergence adds, and those of `Support.apply`; under sequence
    parallelism an all-gather of the hidden states; in the backward pass a SUM all-reduce of [T, H], under sequence
    parallelism a reduce-scatter of [S, H]. D and T must be the same on every rank.
    """
    head = HeadPass(
        rows_T, targets_T, shard, temperature, sequence_parallel, chunk_tokens, token_loss, teacher, kernels, support
    )
    return head.run(hidden_SH, weight_VH, adapter_VR)


@torch.no_grad()
def head_log_probs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    adapter_VR: Tensor | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
    support: Support | None = None,
) -> tuple[Tensor, Tensor]:
    """log p[target] and the entropy of p = softmax(h W^T / temperature), [T] each, without gradient.

    Arguments, errors and collectives are those of `fused_head`'s forward pass.
    """
    head = HeadPass(rows_T, targets_T, shard, temperature, sequence_parallel, chunk_tokens, kernels=kernels, support=support)
    outputs = head.run(hidden_SH, weight_VH, adapter_VR)
    return outputs.log_probs, outputs.entropies
