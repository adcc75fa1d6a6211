"""The exact reverse KL, KL(student || teacher), over the whole vocabulary.

C rows of a chunk, K numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms
from kdrl_mcore.vocab_parallel.divergence import ChunkDivergence, Divergence, TokenSums
from kdrl_mcore.vocab_parallel.shard import VocabShard


@dataclass(frozen=True)
class ExactReverseKL(Divergence):
    """D = sum_v p_v (log p_v - log q_v), in nats: the KD term of KDRL (arXiv 2506.02208) without its sampling variance.

    With z, y the centred logits of student and teacher and lse their log sums of exponentials,

        D = E_p[z - y] - lse_p + lse_q,     dD/dz_v = p_v (z_v - y_v - lse_p + lse_q - D).

    Adds no collective, but one number per token to the chunk's SUM all-reduce.
    """

    def check(self, shard: VocabShard) -> None:
        """Does nothing: it fits every vocabulary."""

    def on_chunk(self, logits: ChunkLogits, shard: VocabShard) -> ChunkDivergence:
        return _OnChunk(logits.difference_C()[None])


class _OnChunk(ChunkDivergence):
    """The leaf is D itself."""

    def __init__(self, sums_KC: Tensor) -> None:
        self.sums_KC = sums_KC

    def value(self, sums_KC: Tensor, tokens: TokenSums, targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        self._lse_difference_C = tokens.teacher_log_total - tokens.log_total
        divergence_C = self._lse_difference_C - sums_KC[0] / tokens.log_total.exp()
        self._value_C = divergence_C
        leaf = divergence_C.clone().requires_grad_()
        return leaf, leaf

    def logits_terms(self, d_leaf: Tensor) -> LogitsTerms:
        return LogitsTerms(d_leaf * (self._lse_difference_C - self._value_C), difference_row_C=-d_leaf)
