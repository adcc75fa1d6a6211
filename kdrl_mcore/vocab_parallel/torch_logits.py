"""A chunk's logits in plain torch: the reference, used on CPU and as the fallback on CUDA.

C rows of a chunk, V vocabulary columns of this rank, K numbers (or tokens) per row, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms, Model, empty_rows, multiply
from kdrl_mcore.vocab_parallel.logits import local_peak, local_top_k
from kdrl_mcore.vocab_parallel.shard import VocabShard


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
        self, hidden_CH: Tensor, weight_VH: Tensor, teacher: tuple[Tensor, Tensor] | None, temperature: float
    ) -> Tensor:
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
        """See `ChunkLogits`. Leaves e_v (y_v - z_v) in the teacher's buffer: its sum gives the divergence, and dD/dz needs no
        more."""
        assert self._teacher_CV is not None
        return self._teacher_CV.sub_(self._student_CV).mul_(self._exp_CV).sum(dim=1)

    def outside(self, own_CK: Tensor, column_CK: Tensor) -> Tensor:
        """See `ChunkLogits`. Overwrites the teacher's logits."""
        assert self._teacher_CV is not None
        columns = self._exp_CV.size(1)
        # Tokens of other ranks are mapped to a spare column.
        outside_CV = torch.ones(len(self._exp_CV), columns + 1, dtype=torch.bool, device=self._exp_CV.device)
        outside_CV = outside_CV.scatter_(1, torch.where(own_CK, column_CK, columns), False)[:, :columns]
        teacher_C = self._teacher_CV.exp_().mul_(outside_CV).sum(dim=1)
        student_C = torch.mul(self._exp_CV, outside_CV, out=self._teacher_CV).sum(dim=1)
        return torch.stack((student_C, teacher_C))

    def totals(self) -> Tensor:
        total_C = self._exp_CV.sum(dim=1)
        # From here on the student's buffer holds e_v z_v, which is all that the entropy and its derivative need.
        product_C = self._student_CV.mul_(self._exp_CV).sum(dim=1)
        return torch.stack((total_C, product_C, *self._teacher_totals))

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
        d_CV.mul_((row_C * scale_C)[:, None])
        one_hots = [] if targets is None else [(targets[0][:, None], targets[1][:, None])]
        for term in terms:
            if term.product_row_C is not None:
                d_CV.addcmul_(self._student_CV, (term.product_row_C * scale_C)[:, None])
            if term.difference_row_C is not None:
                assert self._teacher_CV is not None
                d_CV.addcmul_(self._teacher_CV, (term.difference_row_C * scale_C)[:, None])
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
