"""A chunk's logits in plain torch: the reference, used on CPU and as the fallback on CUDA.

Results that cannot be computed in place are computed for a few rows at a time, so that no further [C, V] is needed.

C rows of a chunk, V vocabulary columns of this rank, K numbers (or tokens) per row, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import (
    TWO_ROUNDS,
    ChunkLogits,
    Comparison,
    LogitsTerms,
    Model,
    empty_rows,
    multiply,
    one_hot_row,
)
from kdrl_mcore.vocab_parallel.logits import MASKED, local_peak, local_top_k
from kdrl_mcore.vocab_parallel.shard import VocabShard

BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**26}
"""The size of a temporary result for a few rows: on CPU it stays in the cache, on CUDA launches should be few."""


class TorchLogits(ChunkLogits):
    """Holds logits and e_v in at least float32, and buffers in the matrix products' precision where that is lower."""

    def __init__(
        self,
        student_CV: Tensor,
        exp_CV: Tensor,
        teacher_CV: Tensor | None,
        low_CV: Tensor | None,
        teacher_low_CV: Tensor | None,
    ) -> None:
        self._student_CV, self._exp_CV, self._teacher_buffer_CV = student_CV, exp_CV, teacher_CV
        self._low_CV, self._teacher_low_CV = low_CV, teacher_low_CV
        self._teacher_CV: Tensor | None = None
        """The teacher's buffer if this chunk has a teacher, otherwise None."""

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None, device: torch.device
    ) -> Self:
        wide = torch.promote_types(dtype, torch.float32)

        def empty(dtype: torch.dtype) -> Tensor:
            return empty_rows(rows, columns, dtype, device)

        low_CV = None if dtype == wide else empty(dtype)
        teacher_low_CV = None
        if teacher_dtype is not None and teacher_dtype != wide:
            teacher_low_CV = low_CV if teacher_dtype == dtype else empty(teacher_dtype)
        return cls(empty(wide), empty(wide), None if teacher_dtype is None else empty(wide), low_CV, teacher_low_CV)

    def first(self, rows: int) -> Self:
        def cut(buffer: Tensor | None) -> Tensor | None:
            return None if buffer is None else buffer[:rows]

        return type(self)(
            self._student_CV[:rows],
            self._exp_CV[:rows],
            cut(self._teacher_buffer_CV),
            cut(self._low_CV),
            cut(self._teacher_low_CV),
        )

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
        self._comparison, self._teacher_entropy = comparison, teacher_entropy
        _project(hidden_CH, weight_VH, temperature, self._student_CV, self._low_CV)
        peaks = [local_peak(self._student_CV)]
        if teacher is not None:
            assert self._teacher_buffer_CV is not None
            self._teacher_CV = self._teacher_buffer_CV
            _project(*teacher, temperature, self._teacher_CV, self._teacher_low_CV)
            peaks.append(local_peak(self._teacher_CV))
        return torch.stack(peaks)

    def centre(self, peaks_KC: Tensor) -> None:
        self._teacher_totals: list[Tensor] = []
        if self._teacher_CV is not None:
            self._teacher_CV.sub_(peaks_KC[1][:, None])
            self._teacher_totals = [torch.exp(self._teacher_CV, out=self._exp_CV).sum(dim=1)]
            if self._teacher_entropy:
                self._teacher_totals.append(self._exp_CV.mul_(self._teacher_CV).sum(dim=1))
        self._student_CV.sub_(peaks_KC[0][:, None])
        torch.exp(self._student_CV, out=self._exp_CV)

    def at(self, column_CK: Tensor) -> tuple[Tensor, Tensor | None]:
        def gather(logits_CV: Tensor) -> Tensor:
            if logits_CV.size(1) == 0:
                return logits_CV.new_zeros(column_CK.shape)
            return logits_CV.gather(1, column_CK)

        return gather(self._student_CV), None if self._teacher_CV is None else gather(self._teacher_CV)

    def largest(self, model: Model, top_k: int) -> Tensor:
        logits_CV = self._student_CV if model == "student" else self._teacher_CV
        assert logits_CV is not None
        return local_top_k(logits_CV, top_k)

    def difference_C(self) -> Tensor:
        """See `ChunkLogits`. Leaves c_v in the teacher's buffer, as dD/dz needs no more."""
        assert self._teacher_CV is not None
        if self._comparison == "reverse":
            return self._teacher_CV.sub_(self._student_CV).mul_(self._exp_CV).sum(dim=1)
        sum_C = self._exp_CV.new_empty(len(self._exp_CV))
        for rows in self._blocks():
            teacher_BV = self._teacher_CV[rows]
            exp_BV = teacher_BV.exp()
            sum_C[rows] = teacher_BV.sub_(self._student_CV[rows]).mul_(exp_BV).sum(dim=1)
            teacher_BV.copy_(exp_BV)
        return sum_C

    def outside(self, own_CK: Tensor, column_CK: Tensor) -> Tensor:
        """See `ChunkLogits`. Overwrites the teacher's logits."""
        if self._exp_CV.size(1) == 0:
            return self._exp_CV.new_zeros(1 if self._teacher_CV is None else 2, len(self._exp_CV))
        # Tokens of other ranks point to column 0, which may also be one of this rank's: the smaller value counts, then the
        # larger.
        lowered_CK = torch.where(own_CK, MASKED, torch.inf).to(self._exp_CV.dtype)
        sums = []
        if self._teacher_CV is not None:
            sums = [self._teacher_CV.scatter_reduce_(1, column_CK, lowered_CK, "amin").exp_().sum(dim=1)]
        kept_CK = torch.where(own_CK, self._exp_CV.gather(1, column_CK), 0.0)
        student_C = self._exp_CV.scatter_reduce_(1, column_CK, lowered_CK.clamp_min_(0.0), "amin").sum(dim=1)
        self._exp_CV.scatter_reduce_(1, column_CK, kept_CK, "amax")
        return torch.stack((student_C, *sums))

    def totals(self) -> Tensor:
        total_C = self._exp_CV.sum(dim=1)
        if self._comparison in TWO_ROUNDS:
            product_C = torch.empty_like(total_C)
            for rows in self._blocks():
                product_C[rows] = (self._student_CV[rows] * self._exp_CV[rows]).sum(dim=1)
        else:
            # From here on the student's buffer holds e_v z_v, which is all that the entropy and its derivative need.
            product_C = self._student_CV.mul_(self._exp_CV).sum(dim=1)
        return torch.stack((total_C, product_C, *self._teacher_totals))

    def mixture(self, beta: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """See `ChunkLogits`. Leaves e_v z_v in the student's buffer and c_v in the teacher's.

        With u = log(q / p): where u <= 0, log(m / p) = log(1 + beta (e^u - 1)), and where u > 0,
        log(m / q) = log(1 + (1 - beta) (e^-u - 1)); the other of the two differs from it by u. So nothing overflows, also where
        p or q is 0 in the precision at hand, and nothing is lost where p is almost q.
        """
        assert self._comparison == "mixture" and self._teacher_CV is not None
        sums_KC = self._exp_CV.new_empty(2, len(self._exp_CV))
        for rows in self._blocks():
            z_BV, e_BV, u_BV = self._student_CV[rows], self._exp_CV[rows], self._teacher_CV[rows]
            q_BV = (u_BV - teacher_log_total_C[rows, None]).exp_()
            u_BV.sub_(z_BV).sub_((teacher_log_total_C - log_total_C)[rows, None])
            # 1 - beta where u > 0, otherwise beta; `where` with two numbers takes ten times as long on CPU.
            share_BV = torch.gt(u_BV, 0.0, out=torch.empty_like(u_BV)).mul_(1.0 - 2.0 * beta).add_(beta)
            log_BV = torch.copysign(u_BV, -1.0).expm1_().mul_(share_BV).log1p_()
            sums_KC[1, rows] = q_BV.mul_(u_BV.clamp(max=0.0).sub_(log_BV)).sum(dim=1)
            sums_KC[0, rows] = -u_BV.clamp_(min=0.0).add_(log_BV).mul_(e_BV).sum(dim=1)
            z_BV.mul_(e_BV)
        sums_KC[0] /= log_total_C.exp()
        return sums_KC

    def clipped(self, bound: float, log_total_C: Tensor, teacher_log_total_C: Tensor) -> Tensor:
        """See `ChunkLogits`. Leaves e_v z_v in the student's buffer and c_v in the teacher's."""
        assert self._comparison == "clipped" and self._teacher_CV is not None
        sums_KC = self._exp_CV.new_empty(2, len(self._exp_CV))
        for rows in self._blocks():
            z_BV, e_BV, y_BV = self._student_CV[rows], self._exp_CV[rows], self._teacher_CV[rows]
            log_q_BV = y_BV - teacher_log_total_C[rows, None]
            term_BV = log_q_BV.sub(z_BV).add_(log_total_C[rows, None]).mul_(log_q_BV.exp_())
            y_BV.exp_().mul_(term_BV <= bound)
            sums_KC[0, rows] = term_BV.clamp_(max=bound).sum(dim=1)
            sums_KC[1, rows] = y_BV.sum(dim=1)
            z_BV.mul_(e_BV)
        sums_KC[1] /= teacher_log_total_C.exp()
        return sums_KC

    def _blocks(self) -> Iterator[slice]:
        """The rows of temporary results."""
        rows, columns = self._exp_CV.shape
        limit = BLOCK_BYTES.get(self._exp_CV.device.type, 2**26)
        step = max(1, limit // max(1, columns * self._exp_CV.element_size()))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def gradient(
        self,
        terms: Sequence[LogitsTerms],
        targets: tuple[Tensor, Tensor] | None,
        total_C: Tensor,
        temperature: float,
        shard: VocabShard,
    ) -> Tensor:
        """See `ChunkLogits`. Computed in place of e_v, then converted to the products' precision."""
        d_CV = self._exp_CV
        scale_C = 1.0 / (total_C * temperature)
        row_C = torch.stack([term.row_C for term in terms]).sum(dim=0)
        replaced = next((term.one_hot for term in terms if term.one_hot_row_C is not None), None)
        if replaced is not None and d_CV.size(1):
            own_CK, column_CK = shard.locate(replaced[0])
            exp_CK = torch.where(own_CK, d_CV.gather(1, column_CK), 0.0)
            d_CV.scatter_add_(1, column_CK, -exp_CK)  # exactly 0 remains
        d_CV.mul_((row_C * scale_C)[:, None])
        if replaced is not None and d_CV.size(1):
            inside_C = torch.stack([one_hot_row(term) for term in terms]).sum(dim=0)
            d_CV.scatter_add_(1, column_CK, exp_CK * (inside_C * scale_C)[:, None])
        one_hots = [] if targets is None else [(targets[0][:, None], targets[1][:, None])]
        for term in terms:
            if term.product_row_C is not None:
                d_CV.addcmul_(self._student_CV, (term.product_row_C * scale_C)[:, None])
            if term.comparison_row_C is not None:
                assert self._teacher_CV is not None
                d_CV.addcmul_(self._teacher_CV, (term.comparison_row_C * scale_C)[:, None])
            if term.one_hot is not None:
                one_hots.append(term.one_hot)
        if d_CV.size(1):
            for ids_CK, values_CK in one_hots:
                own_CK, columns_CK = shard.locate(ids_CK)
                d_CV.scatter_add_(1, columns_CK, torch.where(own_CK, values_CK / temperature, 0.0).to(d_CV.dtype))
        return d_CV if self._low_CV is None else self._low_CV.copy_(d_CV)


def _project(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, out_CV: Tensor, low_CV: Tensor | None) -> None:
    """Multiply in the parameters' precision, then convert to `out_CV`'s."""
    weight_VH = weight_VH[: out_CV.size(1)]
    multiply(hidden_CH, weight_VH, temperature, out_CV if low_CV is None else low_CV)
    if low_CV is not None:
        out_CV.copy_(low_CV)
