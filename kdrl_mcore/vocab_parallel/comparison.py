"""What a divergence between student and teacher must offer so that the one pass over the head can include it.

With z the student's logits over the temperature minus their largest over all ranks, e_v = exp(z_v) and s = sum_v e_v, the
derivative of every loss here is rows of numbers times buffers that are already there, plus a few single columns: `LogitsTerms`.

C rows of a chunk, V vocabulary columns of this rank, K numbers (or further tokens) per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kdrl_mcore.vocab_parallel.shard import VocabShard


@dataclass(frozen=True)
class TokenSums:
    """What the ranks have agreed on for each token of a chunk, all [C].

    Attributes:
        log_prob: log p of the target under the student, a leaf that the loss is differentiated in.
        log_total: log sum_v exp of the student's centred logits; subtracting it turns them into log p.
        teacher_log_prob, teacher_log_total: the teacher's.
    """

    log_prob: Tensor
    log_total: Tensor
    teacher_log_prob: Tensor
    teacher_log_total: Tensor


@dataclass(frozen=True)
class LogitsTerms:
    """Part of dL/dz_v: e_v / s * row_C + products_CV / s * product_row_C + sum_k values_CK 1[v = ids_CK].

    Attributes:
        products: (products_CV, product_row_C): a buffer that holds e_v times something, and its factor.
        one_hot: (ids_CK, values_CK): global token ids, distinct within a row.
    """

    row_C: Tensor
    products: tuple[Tensor, Tensor] | None = None
    one_hot: tuple[Tensor, Tensor] | None = None


class Comparison(ABC):
    """Student and teacher on one chunk: from the local columns to one divergence per token."""

    sums_KC: Tensor
    """This rank's numbers to be summed over the ranks; K may be 0."""

    @abstractmethod
    def divergence(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(leaf, divergence [C]): the divergence as a differentiable function of the leaf (and of `tokens.log_prob`).

        Args:
            sums_KC: `self.sums_KC` summed over the ranks.
            rows: which of the pass's T rows these are.
        """

    @abstractmethod
    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        """What dL/dleaf adds to dL/dz. Called after `divergence`."""


Compare = Callable[[Tensor, Tensor, Tensor, VocabShard], Comparison]
"""(centred student logits [C, V], centred teacher logits [C, V], e [C, V], shard) -> Comparison.

The teacher's buffer is the comparison's to overwrite and to keep until the chunk is done; the student's two must be left as
they are. Collectives, if any, over the shard's group.
"""
