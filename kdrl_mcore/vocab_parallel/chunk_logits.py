"""The interface to one chunk's logits on this rank. It has two implementations: torch on any device, Triton's kernels on CUDA.

z are the student's logits and y the teacher's, divided by the temperature and, after `centre`, minus the row's largest over all
ranks; e_v = exp(z_v). C rows of a chunk, V vocabulary columns of this rank, K numbers (or tokens) per row, H and G hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.shard import VocabShard

ROW_ALIGNMENT_BYTES = 64
"""Rows of logits start at multiples of this: matrix products on GPUs are slow with odd row strides."""

FILLED_COLUMNS = 32
"""Where rows are filled up after the real columns, their length is a multiple of this: 64 bytes of a 16-bit type."""

Model = Literal["student", "teacher"]

Comparison = Literal["reverse", "forward", "mixture", "clipped"]
"""The definition of c_v, the part of a divergence's derivative that compares the models column by column: `reverse`
e_v (y_v - z_v); `forward` exp(y_v); `mixture` e_v log(m_v / p_v), with p, q the distributions and m = beta q + (1 - beta) p;
`clipped` exp(y_v) where q_v log(q_v / p_v) is at most a bound, otherwise 0."""
TWO_ROUNDS: tuple[Comparison, ...] = ("mixture", "clipped")
"""Those whose sums need both distributions, so that the logits are read again after `totals`."""


@dataclass(frozen=True)
class LogitsTerms:
    """Part of dL/dz_v: (e_v (row_C + z_v product_row_C) + c_v comparison_row_C) / s + sum_k values_CK 1[v = ids_CK].

    Attributes:
        comparison_row_C: the factor of c_v, see `Comparison`.
        one_hot: (ids_CK, values_CK): global token ids, distinct within a row.
        one_hot_row_C: replaces row_C in the columns ids_CK; None if it is the same there. At most one of a chunk's terms has
            it.
    """

    row_C: Tensor
    product_row_C: Tensor | None = None
    comparison_row_C: Tensor | None = None
    one_hot: tuple[Tensor, Tensor] | None = None
    one_hot_row_C: Tensor | None = None


class ChunkLogits(ABC):
    """The logits of one chunk, in memory that all chunks reuse. No method communicates.

    The order of calls is `project`, `centre`, any of `at`, `largest`, `difference_C` (once, after `at`) and `outside` (after
    `at`), `totals`, `mixture` or `clipped` (once), and `gradient`, which overwrites the logits.
    """

    @classmethod
    @abstractmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None, device: torch.device
    ) -> Self:
        """Memory for chunks of up to `rows` rows; `teacher_dtype` is None without a teacher."""

    @abstractmethod
    def first(self, rows: int) -> Self:
        """The first rows of the memory."""

    @abstractmethod
    def project(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        temperature: float,
        *,
        comparison: Comparison = "reverse",
        teacher_entropy: bool = False,
    ) -> Tensor:
        """Compute the logits hidden @ weight^T / temperature in the arguments' precision; `teacher` is (hidden [C, G], weight
        [at least V, G]). Returns the largest logit of each row on this rank, [1, C], or [2, C] with a teacher.

        Rows of a weight beyond V are padding. They must be finite, as they may be multiplied, and do not affect any result.

        Args:
            comparison: how this chunk's models will be compared over the vocabulary.
            teacher_entropy: whether `totals` returns what the teacher's entropy needs.
        """

    @abstractmethod
    def centre(self, peaks_KC: Tensor) -> None:
        """Subtract each row's largest logit over all ranks, `peaks_KC`."""

    @abstractmethod
    def at(self, column_CK: Tensor) -> tuple[Tensor, Tensor | None]:
        """(z, y) of local columns, [C, K] each in at least float32; y is None without a teacher. Zeros on a rank without
        columns."""

    @abstractmethod
    def largest(self, model: Model, top_k: int) -> Tensor:
        """The columns [C, min(top_k, V)] of the model's largest logits, in descending order; among equal logits the lower
        column comes first. Does not wait for the device."""

    @abstractmethod
    def difference_C(self) -> Tensor:
        """sum_v e_v (y_v - z_v), or with the comparison `forward` sum_v exp(y_v) (y_v - z_v): [C]. Not for `TWO_ROUNDS`."""

    @abstractmethod
    def outside(self, own_CK: Tensor, column_CK: Tensor) -> Tensor:
        """(sum_v e_v, sum_v exp(y_v)) over all columns except `column_CK`, [2, C], without a teacher [1, C]; entries with
        `own_CK` False are ignored."""

    @abstractmethod
    def totals(self) -> Tensor:
        """(sum_v e_v, sum_v e_v z_v), with a teacher also sum_v exp(y_v), and if its entropy is wanted also
        sum_v exp(y_v) y_v: [2, C], [3, C] or [4, C]."""

    @abstractmethod
    def mixture(self, beta: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """(sum_v p_v log(p_v / m_v), sum_v q_v log(q_v / m_v)), [2, C], with m = beta q + (1 - beta) p. Needs the comparison
        `mixture`.

        Args:
            log_total_C, teacher_log_total_C: log sum_v e_v and log sum_v exp(y_v) over all ranks, which make distributions of
                the logits.
        """

    @abstractmethod
    def clipped(self, bound: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """(sum_v min(q_v log(q_v / p_v), bound), the sum of q_v over the columns that the bound leaves unchanged), [2, C].
        Needs the comparison `clipped`; the arguments are those of `mixture`."""

    @abstractmethod
    def gradient(
        self,
        terms: Sequence[LogitsTerms],
        targets: tuple[Tensor, Tensor] | None,
        total_C: Tensor,
        temperature: float,
        shard: VocabShard,
    ) -> Tensor:
        """dL/d(logits before division by the temperature), in the matrix products' precision and in the chunk's own memory:
        [C, V], possibly followed by columns of zeros for the weight's padding rows.

        Args:
            targets: (token ids [C], what to add to dL/dz there [C]).
            total_C: s, the sum of e_v over all ranks.
        """


def one_hot_row(term: LogitsTerms) -> Tensor:
    """The value that replaces `row_C` in the columns of a term's `one_hot`."""
    return term.row_C if term.one_hot_row_C is None else term.one_hot_row_C


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor [rows, columns] with aligned rows.

    The gaps between rows are zeroed: oneDNN's 16-bit products with AMX multiply them by zero, and a NaN there would spread.
    """
    aligned = ROW_ALIGNMENT_BYTES // dtype.itemsize
    padded = torch.empty(rows, -(-columns // aligned) * aligned, dtype=dtype, device=device)
    padded[:, columns:] = 0
    return padded[:, :columns]


def multiply(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, out_CV: Tensor) -> None:
    """out = hidden @ weight^T / temperature, in the tensors' common type."""
    torch.addmm(out_CV, hidden_CH, weight_VH.T, beta=0.0, alpha=1.0 / temperature, out=out_CV)
