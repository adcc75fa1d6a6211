"""One chunk of tokens: logits, softmax statistics, and the derivative of the logits in the logits' own buffers.

C rows of the chunk, H hidden, G the teacher's hidden, V real vocabulary columns of this rank, T loss rows of the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.collectives import max_over_ranks, sum_over_ranks
from kdrl_mcore.vocab_parallel.comparison import Compare, LogitsTerms, TokenSums
from kdrl_mcore.vocab_parallel.logits import known_or_nan, local_peak, local_target
from kdrl_mcore.vocab_parallel.shard import VocabShard

ROW_ALIGNMENT_BYTES = 64
"""Rows of logits start at multiples of this: matrix products on GPUs are slow with odd row strides."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""(log-probs [C], entropies [C], divergences [C], which of the T rows) -> loss of each token [C]."""


@dataclass(frozen=True)
class Buffers:
    """Memory that every chunk uses again: `student_CV`, `exp_CV` and `teacher_CV` in at least float32, and the matrix products'
    own precision where that is lower."""

    student_CV: Tensor
    exp_CV: Tensor
    teacher_CV: Tensor | None
    low_CV: Tensor | None
    teacher_low_CV: Tensor | None

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None, device: torch.device
    ) -> Buffers:
        """Buffers for chunks of up to `rows` rows; `teacher_dtype` is None without a teacher."""
        wide = torch.promote_types(dtype, torch.float32)

        def empty(dtype: torch.dtype) -> Tensor:
            aligned = ROW_ALIGNMENT_BYTES // dtype.itemsize
            return torch.empty(rows, -(-columns // aligned) * aligned, dtype=dtype, device=device)[:, :columns]

        low_CV = None if dtype == wide else empty(dtype)
        teacher_low_CV = None
        if teacher_dtype is not None and teacher_dtype != wide:
            teacher_low_CV = low_CV if teacher_dtype == dtype else empty(teacher_dtype)
        return cls(empty(wide), empty(wide), None if teacher_dtype is None else empty(wide), low_CV, teacher_low_CV)

    def first(self, rows: int) -> Buffers:
        """The first rows of each."""

        def cut(buffer: Tensor | None) -> Tensor | None:
            return None if buffer is None else buffer[:rows]

        return Buffers(
            self.student_CV[:rows], self.exp_CV[:rows], cut(self.teacher_CV), cut(self.low_CV), cut(self.teacher_low_CV)
        )


class Chunk:
    """The student (and the teacher) on one chunk, statistics known.

    Attributes:
        log_prob_C, entropy_C: of the target and of the student's distribution, the same on every rank.
        divergence_C: from `loss` on; 0 without a teacher.
    """

    def __init__(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        targets_C: Tensor,
        shard: VocabShard,
        temperature: float,
        buffers: Buffers,
        teacher: tuple[Tensor, Tensor, Compare] | None,
    ) -> None:
        """Logits and statistics.

        Args:
            weight_VH: the real columns only.
            teacher: its (hidden states [C, G], head [V, G], comparison with the student), or None.

        Collectives over the shard's group: a MAX all-reduce of one number per token (two with a teacher), a SUM all-reduce of
        four (six with a teacher, and the comparison's), and the comparison's own.
        """
        self._buffers, self._targets_C, self._shard, self._temperature = buffers, targets_C, shard, temperature
        z_CV, e_CV = buffers.student_CV, buffers.exp_CV
        y_CV = None if teacher is None else buffers.teacher_CV
        _project(hidden_CH, weight_VH, temperature, z_CV, buffers.low_CV)
        peaks = [local_peak(z_CV)]
        sums: list[Tensor] = []
        if teacher is not None:
            assert y_CV is not None
            _project(*teacher[:2], temperature, y_CV, buffers.teacher_low_CV)
            peaks.append(local_peak(y_CV))
        peaks_KC = max_over_ranks(torch.stack(peaks), shard)
        if y_CV is not None:
            y_CV.sub_(peaks_KC[1][:, None])
            torch.exp(y_CV, out=e_CV)
            sums += [e_CV.sum(dim=1), local_target(y_CV, targets_C, shard)[0]]
        z_CV.sub_(peaks_KC[0][:, None])
        torch.exp(z_CV, out=e_CV)
        target_C, held_C = local_target(z_CV, targets_C, shard)
        self._comparison = None
        more_KC = z_CV.new_empty(0, len(targets_C))
        if teacher is not None and y_CV is not None:
            self._comparison = teacher[2](z_CV, y_CV, e_CV, shard)
            more_KC = self._comparison.sums_KC
        total_C = e_CV.sum(dim=1)
        # From here on the student's buffer holds e_v z_v: all that the entropy, and later its derivative, needs.
        product_C = z_CV.mul_(e_CV).sum(dim=1)
        sums_KC = sum_over_ranks(torch.cat((torch.stack((total_C, product_C, target_C, held_C, *sums)), more_KC)), shard)
        self._total_C, product_C, target_C, holders_C = sums_KC[:4]
        self._log_total_C = self._total_C.log()
        self._teacher_sums_KC, self._comparison_sums_KC = sums_KC[4 : 4 + len(sums)], sums_KC[4 + len(sums) :]
        self.log_prob_C = known_or_nan(target_C - self._log_total_C, holders_C)
        self.entropy_C = self._log_total_C - product_C / self._total_C
        self.divergence_C = torch.zeros_like(self.log_prob_C)

    def loss(self, chunk_loss: ChunkLoss, rows: slice, *, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """(sum of the tokens' losses, dL/dlogits [C, V] or None where it is zero): of the logits before the temperature, in the
        parameters' precision.

        The derivative stands in the chunk's buffers, whose contents are used up. No communication.

        Args:
            differentiate: whether to form the derivative at all.

        Raises:
            ValueError: `chunk_loss` returned anything but one number per token.
        """
        log_prob_C, entropy_C = self.log_prob_C.clone().requires_grad_(), self.entropy_C.clone().requires_grad_()
        leaves, divergence_C = [log_prob_C, entropy_C], self.divergence_C
        with torch.set_grad_enabled(differentiate):
            if self._comparison is not None:
                log_total_C = self._teacher_sums_KC[0].log()
                tokens = TokenSums(log_prob_C, self._log_total_C, self._teacher_sums_KC[1] - log_total_C, log_total_C)
                leaf, divergence_C = self._comparison.divergence(self._comparison_sums_KC, tokens, self._targets_C, rows)
                leaves.append(leaf)
                self.divergence_C = divergence_C.detach()
            losses_C = chunk_loss(log_prob_C, entropy_C, divergence_C, rows)
            value = losses_C.sum()
        if losses_C.shape != log_prob_C.shape:
            raise ValueError(
                f"token_loss returned shape {tuple(losses_C.shape)} for {len(log_prob_C)} tokens: return each token's own loss"
            )
        if not (differentiate and value.requires_grad):
            return value.detach(), None
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            return value.detach(), None
        return value.detach(), self._logits_gradient(*gradients)

    def _logits_gradient(self, g_C: Tensor | None, h_C: Tensor | None, d_leaf: Tensor | None = None) -> Tensor:
        """dL/dlogits in place of e (then in the products' precision), from the derivatives in log-prob (g), entropy (h) and the
        comparison's leaf.

        d log p_t / dz_v = 1[v = t] - p_v; dH / dz_v = -p_v (log p_v + H) with p_v = e_v / s.
        """
        terms: list[LogitsTerms] = []
        if g_C is not None:
            terms.append(LogitsTerms(-g_C, one_hot=(self._targets_C[:, None], g_C[:, None])))
        if h_C is not None:
            row_C = h_C * (self._log_total_C - self.entropy_C)
            terms.append(LogitsTerms(row_C, products=(self._buffers.student_CV, -h_C)))
        if d_leaf is not None:
            assert self._comparison is not None
            terms.append(self._comparison.logits_terms(d_leaf))
        d_CV = self._buffers.exp_CV
        scale_C = 1.0 / (self._total_C * self._temperature)
        row_C = torch.stack([term.row_C for term in terms]).sum(dim=0)
        d_CV.mul_((row_C * scale_C)[:, None])
        for term in terms:
            if term.products is not None:
                d_CV.addcmul_(term.products[0], (term.products[1] * scale_C)[:, None])
            if term.one_hot is not None and d_CV.size(1):
                own_CK, columns_CK = self._shard.locate(term.one_hot[0])
                d_CV.scatter_add_(1, columns_CK, torch.where(own_CK, term.one_hot[1] / self._temperature, 0.0).to(d_CV.dtype))
        return d_CV if self._buffers.low_CV is None else self._buffers.low_CV.copy_(d_CV)


def _project(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, out_CV: Tensor, low_CV: Tensor | None) -> None:
    """hidden @ weight^T / temperature, multiplied in the parameters' precision, then widened."""
    product_CV = out_CV if low_CV is None else low_CV
    torch.addmm(product_CV, hidden_CH, weight_VH.T, beta=0.0, alpha=1.0 / temperature, out=product_CV)
    if low_CV is not None:
        out_CV.copy_(low_CV)
