"""Divergences restricted to a support of k tokens, computed in the same pass over the head as log-probs and entropy.

The support S of a token is the k most likely tokens of the student or of the teacher. The choice of S is not differentiated.
Given S, every divergence is a function of the k log-probs log p_v, v in S, and perhaps of the log of the mass outside S, whose
derivatives the pass spreads over the columns as it does the target's.

T loss rows of the pass, C rows of a chunk, K = k tokens of a support, M candidates, R ranks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms
from kdrl_mcore.vocab_parallel.collectives import gather_columns
from kdrl_mcore.vocab_parallel.divergence import ChunkDivergence, Divergence, TeacherSide, TokenSums
from kdrl_mcore.vocab_parallel.exact import check_beta
from kdrl_mcore.vocab_parallel.logits import MASKED
from kdrl_mcore.vocab_parallel.shard import VocabShard

Support = Literal["student", "teacher"]
"""The model whose most likely tokens form the support."""

Tail = Literal["truncate", "renormalize", "bucket", "corrected"]
"""How the tokens outside S are treated.

`truncate`: they are left out. A reverse KL may then be negative, and its gradient does not vanish where p = q;
`corrected`: they are left out, and each token's term p log(p/q) of the reverse KL gets q - p, which makes it a divergence
between measures: not negative, with a gradient that vanishes where p = q on S;
`renormalize`: p and q are scaled to sum to 1 on S;
`bucket`: together they count as one more token, with p_out = sum_{v not in S} p_v and q_out likewise; a mass below the smallest
normal number of the statistics' type is replaced by that number.

All except `TopKUnbiased` are biased: docs/method.md has a table of how much each gradient differs from that over the
    vocabulary.
"""

LEAST_KNOWN_MASS = 2.0**-23
"""The precision of a mass near 1 that is a sum of probabilities known in float32."""

LEAST_DIVISOR = 2**20
"""A mass outside S below this multiple of the smallest normal number is never a divisor: the quotient could overflow, and the
probabilities of its tokens are practically 0."""


@dataclass(frozen=True)
class SupportLogProbs:
    """The log-probs of both models on the supports of a chunk's tokens, the same on every rank.

    Attributes:
        ids_CK: the supports, most likely first; among equal logits the lower token id comes first, in every layout.
        log_p_CK: the student's log-probs, with respect to which the loss is differentiated.
        log_q_CK: the teacher's.
        log_p_out_C, log_q_out_C: the logs of the masses outside S; the loss is differentiated with respect to the student's.
            None if the divergence does not need them.
        tokens: the tokens' quantities over the whole vocabulary.
        targets_C: the sampled tokens.
        rows: the position of these rows among the pass's T rows.
    """

    ids_CK: Tensor
    log_p_CK: Tensor
    log_q_CK: Tensor
    log_p_out_C: Tensor | None
    log_q_out_C: Tensor | None
    tokens: TokenSums
    targets_C: Tensor
    rows: slice


@dataclass(frozen=True)
class TopKDivergence(Divergence):
    """A divergence that is a function of the log-probs on a support; subclasses define the function.

    Attributes:
        k: the size of the support.
        support: the model whose k most likely tokens form it.

    Adds an all-gather of [C, 3*k] for each chunk and, if `needs_outside`, two numbers per token to the chunk's SUM all-reduce.

    Raises:
        ValueError: `support` is unknown. `check` raises it if k is not between 1 and the size of the vocabulary.
    """

    k: int
    support: Support

    def __post_init__(self) -> None:
        if self.support not in ("student", "teacher"):
            raise ValueError(f"support is '{self.support}': it must be student or teacher")

    @property
    def needs_outside(self) -> bool:
        """Whether `value` needs the masses outside the support, which cost one more read of the chunk's logits."""
        return False

    @abstractmethod
    def value(self, chunk: SupportLogProbs) -> Tensor:
        """The divergence [C], differentiable in `chunk.log_p_CK`, `chunk.log_p_out_C` and `chunk.tokens.log_prob`. No
        communication."""

    def check(self, shard: VocabShard) -> None:
        if not 1 <= self.k <= shard.size:
            raise ValueError(f"k is {self.k}: it must be between 1 and the vocabulary's {shard.size} tokens")

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _OnSupport(self, logits, shard)


@dataclass(frozen=True)
class SeparableDivergence(TopKDivergence):
    """A sum over tokens of a function of p_v and q_v, `terms`, on the support and its tail.

    Attributes:
        tail: how the tokens outside the support are treated, one of `tails`.

    Raises:
        ValueError: as for `TopKDivergence`, or `tail` is none of `tails`.
    """

    tail: Tail

    tails: ClassVar[tuple[Tail, ...]] = ("truncate", "renormalize", "bucket")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail not in self.tails:
            raise ValueError(f"tail is '{self.tail}': it must be {', '.join(self.tails[:-1])} or {self.tails[-1]}")

    @property
    def needs_outside(self) -> bool:
        # 1 - sum_S p would lose a small remainder to rounding.
        return self.tail == "bucket"

    @abstractmethod
    def terms(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Each token's term of the sum, for tensors of any shape, differentiable in p and log p."""

    def value(self, chunk: SupportLogProbs) -> Tensor:
        log_p_CK, log_q_CK = chunk.log_p_CK, chunk.log_q_CK
        if self.tail == "renormalize":
            log_p_CK = log_p_CK - log_p_CK.logsumexp(dim=1, keepdim=True)
            log_q_CK = log_q_CK - log_q_CK.logsumexp(dim=1, keepdim=True)
        inside_C = self.terms(log_p_CK.exp(), log_p_CK, log_q_CK).sum(dim=1)
        if chunk.log_p_out_C is None or chunk.log_q_out_C is None:
            return inside_C
        return inside_C + self.terms(chunk.log_p_out_C.exp(), chunk.log_p_out_C, chunk.log_q_out_C)


@dataclass(frozen=True)
class TopKReverseKL(SeparableDivergence):
    """sum_v p_v (log p_v - log q_v), in nats, over a support instead of the vocabulary; with the tail `corrected`
    sum_v (p_v (log p_v - log q_v) - p_v + q_v)."""

    tails: ClassVar[tuple[Tail, ...]] = ("truncate", "renormalize", "bucket", "corrected")

    def terms(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        terms = p * (log_p - log_q)
        return terms - p + log_q.exp() if self.tail == "corrected" else terms


@dataclass(frozen=True)
class TopKForwardKL(SeparableDivergence):
    """sum_v q_v (log q_v - log p_v), in nats, over a support instead of the vocabulary.

    With the tail `truncate` on the teacher's support, its optimum is the teacher renormalised on S: the second term of EOPD
    (arXiv 2603.07079). With `bucket` on that support it is the teacher's top-k and a class for the rest (TA-OPD,
    arXiv 2608.14728).

    Raises:
        ValueError: as for `SeparableDivergence`, or `tail` is `truncate` on the student's support.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.support == "student" and self.tail == "truncate":
            raise ValueError(
                "a forward KL truncated to the student's support is not a divergence, as the student can lower it by its "
                "choice of the support: use the tail bucket or renormalize, or the teacher's support"
            )

    def terms(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (log_q - log_p)


@dataclass(frozen=True)
class TopKJensenShannon(SeparableDivergence):
    """sum_v (beta q_v log(q_v / m_v) + (1 - beta) p_v log(p_v / m_v)) with m = beta q + (1 - beta) p, in nats, over a support
    instead of the vocabulary: the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

    No term is negative, so with every tail it is 0 exactly if p = q on the support (with `bucket` and `renormalize`: if the
    resulting distributions are equal), and its gradient vanishes there. Unlike `JensenShannon` it needs no second round of
    sums.

    Raises:
        ValueError: as for `SeparableDivergence`, or beta is not between 0 and 1, or nearer to them than `exact.LEAST_BETA`.
    """

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)

    def terms(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = torch.logaddexp(log_q + math.log(self.beta), log_p + math.log1p(-self.beta))
        return self.beta * log_q.exp() * (log_q - log_m) + (1.0 - self.beta) * p * (log_p - log_m)


@dataclass(frozen=True)
class TopKUnbiased(TopKDivergence):
    """A surrogate of the reverse KL whose gradient is unbiased: exact on the student's top-k set, sampled outside.

    sum_{v in S} sg(p_v (log p_v - log q_v)) log p_v + 1[target not in S] sg(w) (log q_target - log p_target)^2 / 2 with
    w = p_target / mu_target. Its value is not a divergence; its gradient, averaged over targets drawn from mu, is dD/dz.

    Attributes:
        sampler_log_probs_T: log mu of the targets, for w; None if the student itself sampled them (w = 1).
    """

    support: Support = field(default="student", init=False)
    sampler_log_probs_T: Tensor | None

    def value(self, chunk: SupportLogProbs) -> Tensor:
        log_p_CK, tokens = chunk.log_p_CK, chunk.tokens
        factor_CK = (log_p_CK.exp() * (log_p_CK - chunk.log_q_CK)).detach()
        inside_C = (factor_CK * log_p_CK).sum(dim=1)
        d_C = tokens.teacher_log_prob - tokens.log_prob
        outside_C = (chunk.ids_CK != chunk.targets_C[:, None]).all(dim=1)
        sampled_C = 0.5 * d_C.square()
        if self.sampler_log_probs_T is not None:
            sampled_C = (tokens.log_prob.detach() - self.sampler_log_probs_T[chunk.rows]).exp() * sampled_C
        return inside_C + torch.where(outside_C, sampled_C, 0.0)


@dataclass(frozen=True)
class KnownTopK(TeacherSide):
    """The teacher's side of a pass over the head where its k most likely tokens are known, as a server reports them. No logits
    of the teacher are computed: the student's log-probs at the known tokens take K numbers per token in the chunk's SUM
    all-reduce (one more for the mass outside), and there is no all-gather.

    Attributes:
        ids_DK: distinct token ids.
        log_q_DK: the teacher's log-probs of these tokens.
        log_probs_D: those of the targets.
        divergence: on the teacher's support. With the tail `bucket` the teacher's mass outside is 1 minus that of its tokens;
            below `LEAST_KNOWN_MASS`, where only rounding errors are left of it, that number takes its place.
    """

    ids_DK: Tensor
    log_q_DK: Tensor
    log_probs_D: Tensor
    divergence: TopKDivergence

    @property
    def factors(self) -> None:
        return None

    @property
    def known_log_probs_D(self) -> Tensor:
        return self.log_probs_D

    def __len__(self) -> int:
        return len(self.ids_DK)

    def of_rows(self, rows: slice) -> Self:
        return replace(self, ids_DK=self.ids_DK[rows], log_q_DK=self.log_q_DK[rows], log_probs_D=self.log_probs_D[rows])

    def check(self, num_tokens: int, shard: VocabShard) -> None:
        shape = len(self.ids_DK), self.divergence.k
        if self.ids_DK.shape != shape or self.log_q_DK.shape != shape or self.log_probs_D.shape != shape[:1]:
            raise ValueError(
                f"known tokens {tuple(self.ids_DK.shape)}, log-probs {tuple(self.log_q_DK.shape)} and those of the targets "
                f"{tuple(self.log_probs_D.shape)} do not fit: expected [D, {shape[1]}] twice and [D]"
            )
        if shape[0] > num_tokens:
            raise ValueError(f"known tokens of {shape[0]} rows do not fit {num_tokens} loss rows")
        if self.divergence.support != "teacher":
            raise ValueError("only the teacher's most likely tokens are known: use a divergence on the teacher's support")
        self.divergence.check(shard)

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _OnKnownSupport(self, logits, shard)


class _OnSupport(ChunkDivergence):
    """The leaf is log p of the supports, [C, K], with that of the mass outside, if needed, [C, K + 1].

    d log p_out / dz_v = 1[v not in S] p_v / p_out - p_v.
    """

    def __init__(self, divergence: TopKDivergence, logits: ChunkLogits, shard: VocabShard) -> None:
        self._divergence = divergence
        self._candidates = _choose(logits, shard, divergence.k, divergence.support)
        self._ids_CK = self._candidates.ids.long()
        if divergence.needs_outside:
            self.sums_KC = logits.outside(*shard.locate(self._ids_CK))

    def _on_support(self, sums_KC: Tensor, tokens: TokenSums) -> tuple[Tensor, Tensor, Tensor]:
        """(log p [C, K], log q [C, K], the masses of both outside [2, C], of any value if they are not needed)."""
        totals_KC = torch.stack((tokens.log_total, tokens.teacher_log_total))
        masses_KC = sums_KC / totals_KC.exp() if self._divergence.needs_outside else totals_KC
        candidates = self._candidates
        return candidates.student - totals_KC[0][:, None], candidates.teacher - totals_KC[1][:, None], masses_KC

    def value(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        leaf, log_q_CK, masses_KC = self._on_support(sums_KC, tokens)
        log_p_out_C = log_q_out_C = None
        if self._divergence.needs_outside:
            tiny = torch.finfo(leaf.dtype).tiny
            p_out_C, q_out_C = masses_KC.clamp_min(tiny)
            log_q_out_C = q_out_C.log()
            self._divisor_C = p_out_C.clamp_min(LEAST_DIVISOR * tiny)
            leaf = torch.cat((leaf, p_out_C.log()[:, None]), dim=1)
        leaf.requires_grad_()
        if self._divergence.needs_outside:
            log_p_out_C = leaf[:, -1]
        log_p_CK = leaf[:, : self._divergence.k]
        chunk = SupportLogProbs(self._ids_CK, log_p_CK, log_q_CK, log_p_out_C, log_q_out_C, tokens, targets_C, rows)
        return leaf, self._divergence.value(chunk)

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        inside_C = -d_leaf.sum(dim=1)
        one_hot = self._ids_CK, d_leaf[:, : self._divergence.k]
        if not self._divergence.needs_outside:
            return LogitsTerms(inside_C, one_hot=one_hot)
        # Where p_out is small the quotient is large: it must not be added in S only to be subtracted again.
        return LogitsTerms(inside_C + d_leaf[:, -1] / self._divisor_C, one_hot=one_hot, one_hot_row_C=inside_C)


class _OnKnownSupport(_OnSupport):
    """The same on supports that are known before the pass: the student's logits there are sums over the ranks, as each rank
    holds some of them."""

    def __init__(self, known: KnownTopK, logits: ChunkLogits, shard: VocabShard) -> None:
        self._divergence, self._known = known.divergence, known
        self._ids_CK = known.ids_DK
        own_CK, column_CK = shard.locate(self._ids_CK)
        student_CK = torch.where(own_CK, logits.at(column_CK)[0], 0.0)
        outside = [logits.outside(own_CK, column_CK)] if known.divergence.needs_outside else []
        self.sums_KC = torch.cat((student_CK.T, *outside))

    def _on_support(self, sums_KC: Tensor, tokens: TokenSums) -> tuple[Tensor, Tensor, Tensor]:
        k, log_q_CK = self._divergence.k, self._known.log_q_DK.to(sums_KC.dtype)
        known_C = self._known.log_q_DK.double().exp().sum(dim=1)
        q_out_C = (1 - known_C).clamp_min(LEAST_KNOWN_MASS).to(sums_KC.dtype)
        p_out_C = sums_KC[k] / tokens.log_total.exp() if self._divergence.needs_outside else q_out_C
        return sums_KC[:k].T - tokens.log_total[:, None], log_q_CK, torch.stack((p_out_C, q_out_C))


@dataclass(frozen=True)
class _Candidates:
    """Token ids and the centred logits of both models, all [C, K]."""

    ids: Tensor
    student: Tensor
    teacher: Tensor


def _choose(logits: ChunkLogits, shard: VocabShard, k: int, support: Support) -> _Candidates:
    """The support of each row, the same on every rank. One all-gather of [C, 3*k] over the shard's group.

    Ids are sent as floats, which are exact up to 2^24. Ranks are in column order, so the stable sort over all candidates also
    puts lower ids first.
    """
    column_CK = logits.largest(support, k)
    missing = k - column_CK.size(1)
    student_CK, teacher_CK = logits.at(column_CK)
    assert teacher_CK is not None
    local = ((column_CK + shard.start).to(student_CK.dtype), student_CK, teacher_CK)
    padded = [torch.nn.functional.pad(part, (0, missing), value=MASKED) for part in local]
    gathered_CR3K = gather_columns(torch.cat(padded, dim=1), shard).unflatten(1, (shard.ranks, 3, k))
    ids_CM, student_CM, teacher_CM = (gathered_CR3K[:, :, i].flatten(1) for i in range(3))
    ranked_CM = student_CM if support == "student" else teacher_CM
    order_CK = ranked_CM.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _Candidates(*(part.gather(1, order_CK) for part in (ids_CM, student_CM, teacher_CM)))
