"""What a divergence between student and teacher must offer so that the one pass over the head can include it.

C rows of a chunk, V vocabulary columns of this rank, K numbers (or further tokens) per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms
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


Compare = Callable[[ChunkLogits, VocabShard], Comparison]
"""(the chunk's centred logits of both models, shard) -> Comparison. Collectives, if any, over the shard's group."""
