"""Exact reverse KL, KL(student || teacher), of each token in the same pass over the head as log-probs and entropy.

With z, y the centred logits of student and teacher and lse their log sums of exponentials,

    D = sum_v p_v (log p_v - log q_v) = E_p[z - y] - lse_p + lse_q,     dD/dz_v = p_v (z_v - y_v - lse_p + lse_q - D).

S rows of the sequence, T loss rows, the first D of them with a teacher, C rows of a chunk, H hidden, G the teacher's hidden,
V vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk import Kernels
from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms
from kdrl_mcore.vocab_parallel.comparison import Comparison, TokenSums
from kdrl_mcore.vocab_parallel.engine import HeadOutputs, HeadPass, Teacher
from kdrl_mcore.vocab_parallel.shard import VocabShard

DivergenceLoss = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""(log-probs [C], entropies [C], divergences [C], which of the T rows) -> loss of each token [C], differentiable in all."""


def fused_exact_reverse_kl(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_DG: Tensor,
    teacher_weight_VG: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    token_loss: DivergenceLoss,
    shard: VocabShard,
    *,
    temperature: float,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
) -> HeadOutputs:
    """`fused_head` with the exact reverse KL to a teacher: the joint loss, GRPO on log-probs and beta * D, is one pass.

    6*H FLOP per token and column, and 2*G where there is a teacher; no sampling variance; the teacher's logits are never
    stored or sent, and get no gradient. Both softmaxes are over the shard's real columns and at the same temperature.

    Args:
        teacher_hidden_DG: the teacher's last hidden states of the first D of the T rows, on every rank; D may be 0. The other
            rows have no teacher: their divergence is 0 with no gradient, and costs nothing.
        teacher_weight_VG: the teacher's head in the student's vocab-parallel layout: its first rows are the shard's real
            columns, further rows (the teacher's own padding) are ignored.
        token_loss: gets the divergences (nats) as well.
        The others: as for `fused_head`.

    Returns:
        Loss, log-probs, entropies, divergences and the teacher's log-probs of the targets; all but the loss without gradient.

    Raises:
        ValueError: as `fused_head`; or the teacher's tensors do not fit.

    Collectives over the shard's group: those of `fused_head`, with [2, C] in the MAX and [7, C] in the SUM all-reduce
    of chunks with a teacher. D and T are the same on every rank.
    """
    return fused_divergence(
        hidden_SH,
        weight_VH,
        Teacher(teacher_hidden_DG, teacher_weight_VG, _ExactReverseKL),
        rows_T,
        targets_T,
        token_loss,
        shard,
        temperature=temperature,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        kernels=kernels,
    )


def fused_divergence(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    teacher: Teacher,
    rows_T: Tensor,
    targets_T: Tensor,
    token_loss: DivergenceLoss,
    shard: VocabShard,
    *,
    temperature: float,
    sequence_parallel: bool,
    chunk_tokens: int | None,
    kernels: Kernels,
) -> HeadOutputs:
    """`fused_head` with any divergence that `teacher.compare` computes; see `fused_exact_reverse_kl`."""
    return HeadPass(rows_T, targets_T, shard, temperature, sequence_parallel, chunk_tokens, token_loss, teacher, kernels).run(
        hidden_SH, weight_VH
    )


class _ExactReverseKL(Comparison):
    """The leaf is D itself."""

    def __init__(self, logits: ChunkLogits, shard: VocabShard) -> None:
        self.sums_KC = logits.difference_C()[None]

    def divergence(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        self._lse_difference_C = tokens.teacher_log_total - tokens.log_total
        divergence_C = self._lse_difference_C - sums_KC[0] / tokens.log_total.exp()
        self._value_C = divergence_C
        leaf = divergence_C.clone().requires_grad_()
        return leaf, leaf

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        return LogitsTerms(d_leaf * (self._lse_difference_C - self._value_C), difference_row_C=-d_leaf)
