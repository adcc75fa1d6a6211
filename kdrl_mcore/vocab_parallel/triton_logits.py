"""A chunk's logits with Triton's kernels, which read them once for all statistics and overwrite them with their derivative.

The output of the matrix product is the only [C, V] in memory (with a teacher there are two); nothing is widened, centred or
exponentiated in memory. Imported only where Triton can run: on CUDA, or on CPU under Triton's interpreter.

A row takes W columns of memory: the V real ones, then filler up to a multiple that suits the kernels. The filler's logits are
`MASKED`, so its exponentials and its contributions to sums and derivatives are exactly zero. The products also compute the
filler as far as the weight has rows for it (its padding), so that their sizes are even as well.

C rows of a chunk, V real vocabulary columns of this rank, K numbers (or tokens) per row, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel import triton_kernels
from kdrl_mcore.vocab_parallel.chunk_logits import (
    FILLED_COLUMNS,
    TWO_ROUNDS,
    ChunkLogits,
    Comparison,
    LogitsTerms,
    Model,
    multiply,
    one_hot_row,
)
from kdrl_mcore.vocab_parallel.logits import MASKED
from kdrl_mcore.vocab_parallel.shard import VocabShard


class TritonLogits(ChunkLogits):
    """Holds the logits as the products wrote them; `centre` only rescales the rows' sums for the largest logit of all ranks."""

    def __init__(self, columns: int, student_CW: Tensor, teacher_CW: Tensor | None) -> None:
        self._columns, self._student_CW, self._teacher_buffer_CW = columns, student_CW, teacher_CW
        self._teacher_CW: Tensor | None = None
        """The teacher's buffer if this chunk has a teacher, otherwise None."""

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None, device: torch.device
    ) -> Self:
        width = -(-columns // FILLED_COLUMNS) * FILLED_COLUMNS
        return cls(
            columns,
            torch.empty(rows, width, dtype=dtype, device=device),
            None if teacher_dtype is None else torch.empty(rows, width, dtype=teacher_dtype, device=device),
        )

    def first(self, rows: int) -> Self:
        teacher_CW = self._teacher_buffer_CW
        return type(self)(self._columns, self._student_CW[:rows], None if teacher_CW is None else teacher_CW[:rows])

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
        self._comparison, self._parameter = comparison, 0.5
        self._multiplied = self._multiply(hidden_CH, weight_VH, temperature, self._student_CW)
        if teacher is not None:
            assert self._teacher_buffer_CW is not None
            self._teacher_CW = self._teacher_buffer_CW
            self._multiply(*teacher, temperature, self._teacher_CW)
        self._local_KC = triton_kernels.statistics(
            self._student_CW,
            self._teacher_CW,
            forward=comparison == "forward",
            teacher_entropy=teacher_entropy and teacher is not None,
        )
        return self._local_KC[:4:3].clone()  # the maximum over ranks will overwrite it

    def _multiply(self, hidden_CH: Tensor, weight_VH: Tensor, temperature: float, out_CW: Tensor) -> int:
        """Compute the logits, `MASKED` after the real columns. Returns the number of columns for which the weight has rows."""
        columns = min(len(weight_VH), out_CW.size(1))
        multiply(hidden_CH, weight_VH[:columns], temperature, out_CW[:, :columns])
        out_CW[:, self._columns :] = MASKED
        return columns

    def centre(self, peaks_KC: Tensor) -> None:
        self._peaks_KC = peaks_KC
        peak_C, total_C, product_C, *teacher = self._local_KC
        shift_C = peak_C - peaks_KC[0]
        scale_C = shift_C.exp()
        self._totals_KC = torch.stack((total_C, product_C + shift_C * total_C)) * scale_C
        if teacher:
            teacher_peak_C, teacher_total_C, difference_C, *teacher_product = teacher
            teacher_shift_C = teacher_peak_C - peaks_KC[1]
            teacher_scale_C = teacher_shift_C.exp()
            totals = [teacher_total_C, *(part_C + teacher_shift_C * teacher_total_C for part_C in teacher_product)]
            self._totals_KC = torch.cat((self._totals_KC, torch.stack(totals) * teacher_scale_C))
            if self._comparison == "forward":
                scale_C, total_C = teacher_scale_C, teacher_total_C
            self._difference_C = scale_C * (difference_C + (teacher_shift_C - shift_C) * total_C)

    def at(self, column_CK: Tensor) -> tuple[Tensor, Tensor | None]:
        def gather(logits_CW: Tensor, peak_C: Tensor) -> Tensor:
            if self._columns == 0:
                return peak_C.new_zeros(column_CK.shape)
            return logits_CW.gather(1, column_CK).float() - peak_C[:, None]

        student_CK = gather(self._student_CW, self._peaks_KC[0])
        return student_CK, None if self._teacher_CW is None else gather(self._teacher_CW, self._peaks_KC[1])

    def largest(self, model: Model, top_k: int) -> Tensor:
        logits_CW = self._student_CW if model == "student" else self._teacher_CW
        assert logits_CW is not None
        column_CK = triton_kernels.largest(logits_CW, min(top_k, self._columns))
        order_CK = logits_CW.gather(1, column_CK).sort(dim=1, descending=True, stable=True).indices
        return column_CK.gather(1, order_CK)

    def difference_C(self) -> Tensor:
        return self._difference_C

    def outside(self, own_CK: Tensor, column_CK: Tensor) -> Tensor:
        """See `ChunkLogits`. Reads the logits once more, with the columns masked meanwhile."""
        buffers = [self._student_CW, *([] if self._teacher_CW is None else [self._teacher_CW])]
        kept = [buffer_CW.gather(1, column_CK).float() for buffer_CW in buffers if self._columns]
        for buffer_CW in buffers:
            masked_CK = torch.full(column_CK.shape, MASKED, device=buffer_CW.device)
            triton_kernels.overwrite(buffer_CW, column_CK, own_CK, masked_CK)
        found_KC = triton_kernels.statistics(self._student_CW, self._teacher_CW)
        for buffer_CW, kept_CK in zip(buffers, kept, strict=False):
            triton_kernels.overwrite(buffer_CW, column_CK, own_CK, kept_CK)
        return found_KC[1::3] * (found_KC[::3] - self._peaks_KC).exp()

    def totals(self) -> Tensor:
        return self._totals_KC

    def mixture(self, beta: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """See `ChunkLogits`. Reads the logits once more, and `gradient` computes the same logarithms again."""
        assert self._comparison == "mixture" and self._teacher_CW is not None
        numbers_KC = self._second_round(beta, log_total_C, teacher_log_total_C)
        return triton_kernels.mixture(self._student_CW, self._teacher_CW, numbers_KC, beta)

    def clipped(self, bound: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """See `ChunkLogits`. Reads the logits once more, and `gradient` compares the same terms with the bound again."""
        assert self._comparison == "clipped" and self._teacher_CW is not None
        numbers_KC = self._second_round(bound, log_total_C, teacher_log_total_C)
        return triton_kernels.clipped(self._student_CW, self._teacher_CW, numbers_KC, bound)

    def _second_round(self, parameter: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """Keep what `gradient` needs; returns the kernels' numbers of each row [4, C]."""
        self._parameter, self._log_totals = parameter, [log_total_C, teacher_log_total_C]
        return torch.stack((self._peaks_KC[0], log_total_C, self._peaks_KC[1], teacher_log_total_C))

    def gradient(
        self,
        terms: Sequence[LogitsTerms],
        targets: tuple[Tensor, Tensor] | None,
        total_C: Tensor,
        temperature: float,
        shard: VocabShard,
    ) -> Tensor:
        """See `ChunkLogits`. Computed in place of the student's logits. In the columns of a top-k set the derivative nearly
        cancels, so there it is computed in float32 and rounded once."""
        scale_C = 1.0 / (total_C * temperature)
        zero_C = torch.zeros_like(scale_C)
        row_C, product_C, comparison_C = (
            sum((part for part in parts if part is not None), start=zero_C) * scale_C
            for parts in zip(*((term.row_C, term.product_row_C, term.comparison_row_C) for term in terms), strict=True)
        )
        inside_C = sum((one_hot_row(term) for term in terms), start=zero_C) * scale_C
        compares = any(term.comparison_row_C is not None for term in terms)
        ids_C, g_C = (torch.full_like(scale_C, -1, dtype=torch.long), zero_C) if targets is None else targets
        own_C, column_C = shard.locate(ids_C)
        g_C = g_C / temperature
        spread = []
        for ids_CK, values_CK in (term.one_hot for term in terms if term.one_hot is not None):
            own_CK, column_CK = shard.locate(ids_CK)
            assert not compares, "a divergence on a support compares nothing outside it"
            z_CK, _ = self.at(column_CK)
            factor_CK = inside_C[:, None] + product_C[:, None] * z_CK
            at_target_CK = torch.where(ids_CK == ids_C[:, None], g_C[:, None], 0.0)
            spread.append((column_CK, own_CK, z_CK.exp() * factor_CK + values_CK / temperature + at_target_CK))
        numbers = [self._peaks_KC[0], row_C, product_C, g_C]
        teacher_CW = self._teacher_CW if compares else None
        if teacher_CW is not None:
            numbers += [self._peaks_KC[1], comparison_C]
            if self._comparison in TWO_ROUNDS:
                numbers += self._log_totals
        target_C = torch.where(own_C, column_C, -1)
        triton_kernels.differentiate(
            self._student_CW, teacher_CW, target_C, torch.stack(numbers), self._comparison, self._parameter
        )
        for arguments in spread:
            triton_kernels.overwrite(self._student_CW, *arguments)
        return self._student_CW[:, : self._multiplied]
