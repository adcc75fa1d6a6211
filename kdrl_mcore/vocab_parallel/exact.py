"""Divergences over the whole vocabulary, exact: reverse KL, forward KL (also with bounded entries) and the Jensen-Shannon
divergences between them.

z, y are the centred logits of student and teacher, p and q their distributions and lse_p, lse_q the log sums of exponentials,
so log p_v = z_v - lse_p. C rows of a chunk, K numbers per row.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, Comparison, LogitsTerms
from kdrl_mcore.vocab_parallel.divergence import ChunkDivergence, Divergence, TokenSums
from kdrl_mcore.vocab_parallel.shard import VocabShard

LEAST_BETA = 1e-6
"""How near to 0 and 1 the Jensen-Shannon divergence's beta may be: float32 must tell 1 - beta from 1."""


def check_beta(beta: float) -> None:
    """Raise ValueError if a Jensen-Shannon divergence's beta is not between 0 and 1, or nearer to them than `LEAST_BETA`."""
    if not LEAST_BETA <= beta <= 1.0 - LEAST_BETA:
        raise ValueError(
            f"beta is {beta}: it must be between {LEAST_BETA:g} and 1 - {LEAST_BETA:g}, as the divergence vanishes at both "
            "ends; use the forward KL instead of 0, and the reverse KL instead of 1"
        )


@dataclass(frozen=True)
class ExactReverseKL(Divergence):
    """D = sum_v p_v (log p_v - log q_v), in nats: the KD term of KDRL (arXiv 2506.02208) without its sampling variance.

        D = E_p[z - y] - lse_p + lse_q,     dD/dz_v = p_v (z_v - y_v - lse_p + lse_q - D).

    Adds no collective, but one number per token to the chunk's SUM all-reduce.
    """

    def check(self, shard: VocabShard) -> None:
        """Does nothing: it fits every vocabulary."""

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _Reverse(logits.difference_C()[None])


@dataclass(frozen=True)
class ExactForwardKL(Divergence):
    """D = sum_v q_v (log q_v - log p_v), in nats: that of classical distillation (arXiv 1503.02531) on the student's prefixes.

        D = E_q[y - z] - lse_q + lse_p,     dD/dz_v = p_v - q_v.

    Adds no collective, but one number per token to the chunk's SUM all-reduce.
    """

    comparison: ClassVar[Comparison] = "forward"

    def check(self, shard: VocabShard) -> None:
        """Does nothing: it fits every vocabulary."""

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _Forward(logits.difference_C()[None])


@dataclass(frozen=True)
class ClippedForwardKL(Divergence):
    """D = sum_v min(q_v (log q_v - log p_v), bound), in nats: the forward KL whose entries are bounded, as in OPSD
    (arXiv 2601.18734) and PW-OPSD (arXiv 2605.21606).

        dD/dz_v = p_v Q - q_v 1[v unbounded],     Q the sum of q over the entries that the bound leaves unchanged.

    Where the models disagree the teacher's token exceeds the bound and has no gradient, so that few tokens cannot outweigh all
    others. It is not a divergence: D may be negative, and D = 0 does not mean p = q.

    Adds to each chunk one SUM all-reduce of two numbers per token, since an entry is compared with the bound only once both
    models' sums over the vocabulary are known, and one more read of the logits.

    Raises:
        ValueError: the bound is not positive.
    """

    bound: float

    comparison: ClassVar[Comparison] = "clipped"

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound is {self.bound}: it must be positive")

    def check(self, shard: VocabShard) -> None:
        """Does nothing: it fits every vocabulary."""

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _Clipped(logits, self.bound)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """D = beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, in nats: the generalised Jensen-Shannon
    divergence of GKD (arXiv 2306.13649).

        dD/dz_v = (1 - beta) p_v (log(p_v / m_v) - KL(p || m)).

    D / beta tends to the forward KL for beta -> 0, and D / (1 - beta) to the reverse KL for beta -> 1; D and its gradient
    vanish there.

    Adds to each chunk one SUM all-reduce of two numbers per token, since m needs both models' sums over the vocabulary first,
    and one more read of the logits.

    Raises:
        ValueError: beta is not between 0 and 1, or nearer to them than `LEAST_BETA`.
    """

    beta: float

    comparison: ClassVar[Comparison] = "mixture"

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def check(self, shard: VocabShard) -> None:
        """Does nothing: it fits every vocabulary."""

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _Mixture(logits, self.beta)


class _Exact(ChunkDivergence):
    """The leaf is D itself."""

    def __init__(self, sums_KC: Tensor | None) -> None:
        self.sums_KC = sums_KC

    def value(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        self._value_C = self._divergence_C(sums_KC, tokens)
        leaf = self._value_C.clone().requires_grad_()
        return leaf, leaf

    @abstractmethod
    def _divergence_C(self, sums_KC: Tensor, tokens: TokenSums) -> Tensor:
        """D, from the sums over all ranks."""


class _Reverse(_Exact):
    def _divergence_C(self, sums_KC: Tensor, tokens: TokenSums) -> Tensor:
        self._lse_difference_C = tokens.teacher_log_total - tokens.log_total
        return self._lse_difference_C - sums_KC[0] / tokens.log_total.exp()

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        return LogitsTerms(d_leaf * (self._lse_difference_C - self._value_C), comparison_row_C=-d_leaf)


class _Forward(_Exact):
    def _divergence_C(self, sums_KC: Tensor, tokens: TokenSums) -> Tensor:
        self._lse_difference_C = tokens.log_total - tokens.teacher_log_total
        return sums_KC[0] / tokens.teacher_log_total.exp() + self._lse_difference_C

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        # Terms are divided by the student's sum.
        return LogitsTerms(d_leaf, comparison_row_C=-d_leaf * self._lse_difference_C.exp())


class _Clipped(_Exact):
    def __init__(self, logits: ChunkLogits, bound: float) -> None:
        super().__init__(None)
        self._logits, self._bound = logits, bound

    def second_sums_KC(self, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        return self._logits.clipped(self._bound, log_total_C, teacher_log_total_C)

    def _divergence_C(self, sums_KC: Tensor, tokens: TokenSums) -> Tensor:
        value_C, self._kept_C = sums_KC
        self._lse_difference_C = tokens.log_total - tokens.teacher_log_total
        return value_C

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        # Terms are divided by the student's sum.
        return LogitsTerms(d_leaf * self._kept_C, comparison_row_C=-d_leaf * self._lse_difference_C.exp())


class _Mixture(_Exact):
    def __init__(self, logits: ChunkLogits, beta: float) -> None:
        super().__init__(None)
        self._logits, self._beta = logits, beta

    def second_sums_KC(self, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        return self._logits.mixture(self._beta, log_total_C, teacher_log_total_C)

    def _divergence_C(self, sums_KC: Tensor, tokens: TokenSums) -> Tensor:
        self._student_C, teacher_C = sums_KC
        return self._beta * teacher_C + (1.0 - self._beta) * self._student_C

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        row_C = (1.0 - self._beta) * d_leaf
        return LogitsTerms(-row_C * self._student_C, comparison_row_C=-row_C)
