"""Reverse KL to a teacher restricted to a top-k set of tokens, in the same pass over the head as log-probs and entropy.

The set S is the student's or the teacher's k most likely tokens. Nothing differentiates the choice of S; on it every form is a
function of the k log-probs log p_v, v in S, whose derivatives the pass spreads over the columns as it does the target's.

S rows of the sequence, T loss rows, the first D of them with a teacher, C rows of a chunk, H hidden, G the teacher's hidden,
V vocabulary columns of this rank, K = k tokens of a set, M candidates, R ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk import Kernels
from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms
from kdrl_mcore.vocab_parallel.collectives import gather_columns
from kdrl_mcore.vocab_parallel.comparison import Comparison, TokenSums
from kdrl_mcore.vocab_parallel.divergence import DivergenceLoss, fused_divergence
from kdrl_mcore.vocab_parallel.engine import HeadOutputs, Teacher
from kdrl_mcore.vocab_parallel.logits import MASKED
from kdrl_mcore.vocab_parallel.shard import VocabShard

Support = Literal["student", "teacher"]
Tail = Literal["truncate", "renormalize", "bucket"]


def fused_top_k_reverse_kl(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_DG: Tensor,
    teacher_weight_VG: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    token_loss: DivergenceLoss,
    shard: VocabShard,
    *,
    top_k: int,
    support: Support,
    tail: Tail,
    temperature: float,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
) -> HeadOutputs:
    """`fused_exact_reverse_kl` with a top-k set in place of the vocabulary.

    `tail` says what becomes of the tokens outside S:
    `truncate`: they are left out, sum_S p (log p - log q), which may be negative;
    `renormalize`: p and q are scaled to sum to 1 on S;
    `bucket`: together they are one more token, p_out (log p_out - log q_out) with p_out = sum_{v not in S} p_v; a mass
    below the smallest normal number of the statistics' type counts as that number in the logarithms.

    Args:
        top_k: the size of S. Of equal logits the lower token ids are chosen, whatever the layout.
        support: whose most likely tokens.
        The others: as for `fused_exact_reverse_kl`.

    Raises:
        ValueError: as there; or top_k is not in 1 to shard.size, or support or tail is unknown.

    Collectives over the shard's group: those of `fused_exact_reverse_kl`, and for each chunk an all-gather of [C, 3*k].
    """
    if tail not in ("truncate", "renormalize", "bucket"):
        raise ValueError(f"tail is '{tail}': it must be truncate, renormalize or bucket")
    compare = partial(_TopKReverseKL, top_k=_checked(top_k, support, shard), support=support, tail=tail)
    return fused_divergence(
        hidden_SH,
        weight_VH,
        Teacher(teacher_hidden_DG, teacher_weight_VG, compare),
        rows_T,
        targets_T,
        token_loss,
        shard,
        temperature=temperature,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        kernels=kernels,
    )


def fused_top_k_unbiased(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_DG: Tensor,
    teacher_weight_VG: Tensor,
    rows_T: Tensor,
    targets_T: Tensor,
    token_loss: DivergenceLoss,
    shard: VocabShard,
    *,
    top_k: int,
    sampler_log_probs_T: Tensor | None,
    temperature: float,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
) -> HeadOutputs:
    """A surrogate of the reverse KL whose gradient is unbiased: exact on the student's top-k set, sampled outside.

    sum_{v in S} sg(p_v (log p_v - log q_v)) log p_v + 1[target not in S] sg(w) (log q_target - log p_target)^2 / 2 with
    w = p_target / mu_target. Its value is not a divergence; its gradient, averaged over targets drawn from mu, is dD/dz.

    Args:
        sampler_log_probs_T: log mu of the targets, for w; None where the student itself sampled them (w = 1).
        The others: as for `fused_top_k_reverse_kl`, collectives and errors as well.
    """
    compare = partial(_TopKUnbiased, top_k=_checked(top_k, "student", shard), sampler_log_probs_T=sampler_log_probs_T)
    return fused_divergence(
        hidden_SH,
        weight_VH,
        Teacher(teacher_hidden_DG, teacher_weight_VG, compare),
        rows_T,
        targets_T,
        token_loss,
        shard,
        temperature=temperature,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        kernels=kernels,
    )


def _checked(top_k: int, support: str, shard: VocabShard) -> int:
    if not 1 <= top_k <= shard.size:
        raise ValueError(f"top_k is {top_k}: it must be between 1 and the vocabulary's {shard.size} tokens")
    if support not in ("student", "teacher"):
        raise ValueError(f"support is '{support}': it must be student or teacher")
    return top_k


@dataclass(frozen=True)
class _Candidates:
    """Tokens with the centred logits of both models, all [C, K]."""

    ids: Tensor
    student: Tensor
    teacher: Tensor


def _choose(logits: ChunkLogits, shard: VocabShard, top_k: int, support: Support) -> _Candidates:
    """The set S of each row, the same on every rank. One all-gather of [C, 3*top_k] over the shard's group.

    Ids travel as floats, which are exact up to 2^24. Ranks stand in column order, so the stable sort over all candidates again
    prefers lower ids.
    """
    column_CK = logits.largest(support, top_k)
    missing = top_k - column_CK.size(1)
    student_CK, teacher_CK = logits.at(column_CK)
    assert teacher_CK is not None
    local = ((column_CK + shard.start).to(student_CK.dtype), student_CK, teacher_CK)
    padded = [torch.nn.functional.pad(part, (0, missing), value=MASKED) for part in local]
    gathered_CR3K = gather_columns(torch.cat(padded, dim=1), shard).unflatten(1, (shard.ranks, 3, top_k))
    ids_CM, student_CM, teacher_CM = (gathered_CR3K[:, :, i].flatten(1) for i in range(3))
    ranked_CM = student_CM if support == "student" else teacher_CM
    order_CK = ranked_CM.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return _Candidates(*(part.gather(1, order_CK) for part in (ids_CM, student_CM, teacher_CM)))


class _TopK(Comparison):
    """The leaf is log p of the set, [C, K]."""

    def __init__(self, logits: ChunkLogits, shard: VocabShard, *, top_k: int, support: Support) -> None:
        self._set = _choose(logits, shard, top_k, support)
        self._ids_CK = self._set.ids.long()
        self.sums_KC = self._set.student.new_empty(0, len(self._ids_CK))

    def divergence(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p_CK = (self._set.student - tokens.log_total[:, None]).requires_grad_()
        log_q_CK = self._set.teacher - tokens.teacher_log_total[:, None]
        return log_p_CK, self._value(log_p_CK, log_q_CK, sums_KC, tokens, targets_C, rows)

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        return LogitsTerms(-d_leaf.sum(dim=1), one_hot=(self._ids_CK, d_leaf))

    @abstractmethod
    def _value(
        self, log_p_CK: Tensor, log_q_CK: Tensor, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice
    ) -> Tensor:
        """The divergence [C] from the set's log-probs."""


class _TopKReverseKL(_TopK):
    def __init__(self, logits: ChunkLogits, shard: VocabShard, *, top_k: int, support: Support, tail: Tail) -> None:
        super().__init__(logits, shard, top_k=top_k, support=support)
        self._tail = tail
        if tail == "bucket":
            # 1 - sum_S p would lose a small rest to rounding.
            self.sums_KC = logits.outside(*shard.locate(self._ids_CK))

    def _value(
        self, log_p_CK: Tensor, log_q_CK: Tensor, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice
    ) -> Tensor:
        if self._tail == "renormalize":
            log_p_CK = log_p_CK - log_p_CK.logsumexp(dim=1, keepdim=True)
            log_q_CK = log_q_CK - log_q_CK.logsumexp(dim=1, keepdim=True)
        inside_C = (log_p_CK.exp() * (log_p_CK - log_q_CK)).sum(dim=1)
        if self._tail != "bucket":
            return inside_C
        tiny = torch.finfo(log_p_CK.dtype).tiny
        p_inside_C = log_p_CK.exp().sum(dim=1)
        # The value comes from the sum outside S, the derivative from p_out = 1 - sum_S p, of which it is the exact one.
        p_out_C = (sums_KC[0] / tokens.log_total.exp()).clamp_min(tiny) - (p_inside_C - p_inside_C.detach())
        q_out_C = (sums_KC[1] / tokens.teacher_log_total.exp()).clamp_min(tiny)
        return inside_C + p_out_C * (p_out_C.log() - q_out_C.log())


class _TopKUnbiased(_TopK):
    def __init__(self, logits: ChunkLogits, shard: VocabShard, *, top_k: int, sampler_log_probs_T: Tensor | None) -> None:
        super().__init__(logits, shard, top_k=top_k, support="student")
        self._sampler_log_probs_T = sampler_log_probs_T

    def _value(
        self, log_p_CK: Tensor, log_q_CK: Tensor, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice
    ) -> Tensor:
        factor_CK = (log_p_CK.exp() * (log_p_CK - log_q_CK)).detach()
        inside_C = (factor_CK * log_p_CK).sum(dim=1)
        d_C = tokens.teacher_log_prob - tokens.log_prob
        outside_C = (self._ids_CK != targets_C[:, None]).all(dim=1)
        sampled_C = 0.5 * d_C.square()
        if self._sampler_log_probs_T is not None:
            sampled_C = (tokens.log_prob.detach() - self._sampler_log_probs_T[rows]).exp() * sampled_C
        return inside_C + torch.where(outside_C, sampled_C, 0.0)
