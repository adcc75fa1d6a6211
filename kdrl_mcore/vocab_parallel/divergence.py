"""The interface of a divergence between student and teacher, as the pass over the head calls it.

A `Divergence` defines how the two models are compared, in the same way for every token; a `ChunkDivergence` computes it for one
chunk. A new divergence is one subclass: of `top_k.SeparableDivergence` if it is a sum over a support, else of `Divergence`.

T loss rows, the first D of them with a teacher, C rows of a chunk, G the teacher's hidden, V vocabulary columns of this rank,
K numbers (or further tokens) per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, Comparison, LogitsTerms
from kdrl_mcore.vocab_parallel.shard import VocabShard


@dataclass(frozen=True)
class TokenSums:
    """Quantities of each token of a chunk that are already reduced over the ranks, all [C].

    Attributes:
        log_prob: log p of the target under the student, a leaf with respect to which the loss is differentiated.
        log_total: log sum_v exp of the student's centred logits; subtracting it turns them into log p.
        teacher_log_prob, teacher_log_total: the teacher's.
    """

    log_prob: Tensor
    log_total: Tensor
    teacher_log_prob: Tensor
    teacher_log_total: Tensor


class ChunkDivergence(ABC):
    """The divergence on one chunk: from the local columns to one number per token."""

    sums_KC: Tensor | None = None
    """This rank's numbers that are to be summed over the ranks, if any."""

    def second_sums_KC(self, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor | None:
        """This rank's further numbers to be summed over the ranks, if they need the distributions themselves, or None. No
        communication.

        Args:
            log_total_C, teacher_log_total_C: as in `TokenSums`.
        """
        return None

    @abstractmethod
    def value(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(leaf, divergence [C]), where the divergence is a differentiable function of the leaf (and of `tokens.log_prob`). No
        communication.

        Args:
            sums_KC: `self.sums_KC` summed over the ranks, followed by the second sums; K may be 0.
            rows: the position of these rows among the pass's T rows.
        """

    @abstractmethod
    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        """The contribution of dL/dleaf to dL/dz. Called after `value`. No communication."""


class Divergence(ABC):
    """A comparison of the student's distribution p of a token with the teacher's, q.

    Attributes:
        comparison: the quantity that the chunk's logits provide for each column, if any.
    """

    comparison: ClassVar[Comparison] = "reverse"

    @abstractmethod
    def check(self, shard: VocabShard) -> None:
        """Raise ValueError if the divergence does not fit the vocabulary. No communication."""

    @abstractmethod
    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        """Begin a chunk; `logits` holds the centred logits of both models. Collectives, if any, over the shard's group."""


class TeacherSide(ABC):
    """The teacher's side of a pass over the head, for the first D of its T loss rows; the other rows have no teacher: their
    divergence is 0 without gradient, at no cost.

    Attributes:
        divergence: the divergence to compute.
        with_entropy: whether to compute the entropy of the teacher's distribution, too.
        factors: (hidden [D, G], weight [at least V, G]) of the teacher's logits; None if they are not computed.
        known_log_probs_D: log q of the targets, if it is not computed from the logits; otherwise None.
    """

    divergence: Divergence
    with_entropy: bool = False

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor] | None: ...

    @property
    @abstractmethod
    def known_log_probs_D(self) -> Tensor | None: ...

    @abstractmethod
    def __len__(self) -> int:
        """D."""

    @abstractmethod
    def of_rows(self, rows: slice) -> Self:
        """The inputs of some of the D rows."""

    @abstractmethod
    def check(self, num_tokens: int, shard: VocabShard) -> None:
        """Raise ValueError if shapes, types or the divergence do not fit `num_tokens` loss rows and the student's columns."""

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        """Begin a chunk with the divergence. Collectives, if any, over the shard's group."""
        return self.divergence.on_chunk(logits, shard)


@dataclass(frozen=True)
class TeacherInputs(TeacherSide):
    """The teacher's side of a pass over the head that computes the teacher's logits.

    Attributes:
        hidden_DG: the teacher's last hidden states of the first D of the T loss rows, the same on every rank of the shard's
            group; D may be 0. The other rows have no teacher: their divergence is 0 without gradient, at no cost.
        weight_VG: the teacher's head in the student's vocab-parallel layout, in the type of the hidden states. The first rows
            are the shard's real columns; further rows (the teacher's own padding) are not used.
        divergence: the divergence to compute.
        with_entropy: whether to compute the entropy of the teacher's distribution too, over the whole vocabulary. It costs one
            more number per token in the chunk's SUM all-reduce.
    """

    hidden_DG: Tensor
    weight_VG: Tensor
    divergence: Divergence
    with_entropy: bool = False

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.hidden_DG, self.weight_VG

    @property
    def known_log_probs_D(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.hidden_DG)

    def of_rows(self, rows: slice) -> Self:
        return replace(self, hidden_DG=self.hidden_DG[rows])

    def check(self, num_tokens: int, shard: VocabShard) -> None:
        hidden_DG, weight_VG = self.hidden_DG, self.weight_VG
        if len(hidden_DG) > num_tokens or hidden_DG.size(1) != weight_VG.size(1) or hidden_DG.dtype != weight_VG.dtype:
            raise ValueError(
                f"teacher hidden states {tuple(hidden_DG.shape)} {hidden_DG.dtype} and head {tuple(weight_VG.shape)} "
                f"{weight_VG.dtype} do not fit: expected [at most {num_tokens}, G] and [columns, G] of one type"
            )
        if weight_VG.size(0) < shard.real_columns:
            raise ValueError(
                f"the teacher's head has {weight_VG.size(0)} columns on this rank, fewer than the student's "
                f"{shard.real_columns}: load it in the student's vocab-parallel layout"
            )
        self.divergence.check(shard)
