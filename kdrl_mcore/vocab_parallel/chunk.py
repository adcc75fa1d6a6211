"""One chunk of tokens: logits, softmax statistics, and the derivative of the logits, which overwrites them.

C rows of the chunk, H hidden, G the teacher's hidden, V real vocabulary columns of this rank, T loss rows of the whole pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel.chunk_logits import ChunkLogits, LogitsTerms
from kdrl_mcore.vocab_parallel.collectives import max_over_ranks, sum_over_ranks
from kdrl_mcore.vocab_parallel.divergence import Divergence, TeacherSide, TokenSums
from kdrl_mcore.vocab_parallel.logits import known_or_nan
from kdrl_mcore.vocab_parallel.shard import VocabShard
from kdrl_mcore.vocab_parallel.support import Support
from kdrl_mcore.vocab_parallel.torch_logits import TorchLogits


@dataclass(frozen=True)
class HeadTokens:
    """The inputs of a token's loss, for each token of a chunk: [C] each, in nats, the same on every rank.

    Attributes:
        log_probs: log p of the target under the student; below `support.OUTSIDE` if the target is outside the support of p.
        entropies: of p, over the whole vocabulary.
        divergences: from the teacher; 0 without one.
        teacher_log_probs: log q of the target under the teacher, without gradient; 0 without one.
        teacher_entropies: of q, over the whole vocabulary, without gradient; 0 without a teacher. None unless asked for.

    The loss is differentiated with respect to the first three; divergences have no gradient without a teacher.
    """

    log_probs: Tensor
    entropies: Tensor
    divergences: Tensor
    teacher_log_probs: Tensor
    teacher_entropies: Tensor | None = None


TokenLoss = Callable[[HeadTokens, slice], Tensor]
"""(the chunk's tokens, their slice of the T rows) -> loss of each token [C], differentiable in the log-probs, entropies and
divergences."""

Kernels = Literal["auto", "torch", "triton"]
"""The implementation that computes a chunk: `auto` is Triton's kernels on CUDA if triton is installed and no type is float64,
otherwise torch."""


def logits_memory(
    kernels: Kernels, rows: int, columns: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None, device: torch.device
) -> ChunkLogits:
    """Memory for chunks of up to `rows` rows, for the chosen kernels; `teacher_dtype` is None without a teacher.

    Raises:
        ValueError: `kernels` is unknown, or is `triton` and a type is float64.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels is '{kernels}': it must be auto, torch or triton")
    wide = torch.float64 in (dtype, teacher_dtype)
    if kernels == "triton" and wide:
        raise ValueError("Triton's kernels add up in float32 and would lose float64's precision: use kernels='torch'")
    if kernels == "triton" or (kernels == "auto" and not wide and chooses_triton(device)):
        # Not at the top: triton is optional, and on CPU only its interpreter could run.
        from kdrl_mcore.vocab_parallel.triton_logits import TritonLogits

        return TritonLogits.allocate(rows, columns, dtype, teacher_dtype, device)
    return TorchLogits.allocate(rows, columns, dtype, teacher_dtype, device)


def chooses_triton(device: torch.device) -> bool:
    """Whether `auto` uses Triton's kernels on this device, for types up to float32."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether triton is installed; logs a warning once if not."""
    found = find_spec("triton") is not None
    if not found:
        logging.getLogger(__name__).warning(
            "triton is not installed: the output head runs in plain torch, slower and with more memory"
        )
    return found


class Chunk:
    """The student's (and the teacher's) softmax statistics on one chunk, and its loss.

    Attributes:
        log_prob_C, entropy_C: the student's log-prob of the target and its entropy, the same on every rank.
        teacher_log_prob_C: the teacher's log-prob of the target; 0 without a teacher.
        teacher_entropy_C: the teacher's entropy; 0 without a teacher, None unless asked for.
        divergence_C: set by `loss`; 0 without a teacher.
    """

    def __init__(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        targets_C: Tensor,
        shard: VocabShard,
        temperature: float,
        logits: ChunkLogits,
        teacher: TeacherSide | None,
        *,
        teacher_entropy: bool = False,
        support: Support | None = None,
    ) -> None:
        """Compute logits and statistics.

        Args:
            weight_VH: the real columns only.
            teacher: the teacher's side of these rows, or None.
            teacher_entropy: whether the pass asks for the teacher's entropy.
            support: the student's distribution is truncated to it.

        Collectives over the shard's group: a MAX all-reduce of one number per token (two with a teacher), those of
        `Support.apply`, a SUM all-reduce of four (with a teacher six, for its entropy seven, and those of the divergence), the
        divergence's own collectives, and for a divergence with second sums a SUM all-reduce of those.
        """
        self._logits, self._targets_C, self._shard, self._temperature = logits, targets_C, shard, temperature
        teacher_factors = None if teacher is None else teacher.factors
        comparison = Divergence.comparison if teacher is None else teacher.divergence.comparison
        peaks_KC = logits.project(
            hidden_CH, weight_VH, teacher_factors, temperature, comparison=comparison, teacher_entropy=teacher_entropy
        )
        peaks_KC = max_over_ranks(peaks_KC, shard)
        if support is not None:
            support.apply(logits, peaks_KC[0], shard)
        logits.centre(peaks_KC)
        own_C, column_C = shard.locate(targets_C)
        targets = [torch.where(own_C, z_C1[:, 0], 0.0) for z_C1 in logits.at(column_C[:, None]) if z_C1 is not None]
        held_C = own_C.to(peaks_KC.dtype)
        self._divergence = None if teacher is None else teacher.on_chunk(logits, shard)
        parts = [logits.totals(), torch.stack((*targets, held_C))]
        if self._divergence is not None and self._divergence.sums_KC is not None:
            parts.append(self._divergence.sums_KC)
        sums_KC = sum_over_ranks(torch.cat(parts), shard)
        totals_KC, targets_KC, self._divergence_sums_KC = sums_KC.tensor_split((len(parts[0]), len(parts[0]) + len(parts[1])))
        self._total_C, product_C, *teacher_totals = totals_KC
        target_C, *teacher_target, holders_C = targets_KC
        self._log_total_C = self._total_C.log()
        self.log_prob_C = known_or_nan(target_C - self._log_total_C, holders_C)
        self.entropy_C = self._log_total_C - product_C / self._total_C
        self.divergence_C = self.teacher_log_prob_C = torch.zeros_like(self.log_prob_C)
        self.teacher_entropy_C = torch.zeros_like(self.log_prob_C) if teacher_entropy else None
        if teacher is not None and teacher.known_log_probs_D is not None:
            self.teacher_log_prob_C = teacher.known_log_probs_D.to(self.log_prob_C.dtype)
            self._teacher_log_total_C = torch.zeros_like(self.log_prob_C)
        elif self._divergence is not None:
            teacher_total_C, *teacher_products = teacher_totals
            self._teacher_log_total_C = teacher_total_C.log()
            if teacher_products:
                self.teacher_entropy_C = self._teacher_log_total_C - teacher_products[0] / teacher_total_C
            self.teacher_log_prob_C = teacher_target[0] - self._teacher_log_total_C
            second_KC = self._divergence.second_sums_KC(self._log_total_C, self._teacher_log_total_C)
            if second_KC is not None:
                self._divergence_sums_KC = torch.cat((self._divergence_sums_KC, sum_over_ranks(second_KC, shard)))

    def loss(self, token_loss: TokenLoss, rows: slice, *, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """(sum of the tokens' losses, dL/dlogits [C, V] or None if it is zero). The logits are those before division by the
        temperature; their derivative is in the parameters' precision.

        The derivative overwrites the chunk's logits. No communication.

        Args:
            differentiate: whether to compute the derivative.

        Raises:
            ValueError: `token_loss` did not return one number per token.
        """
        log_prob_C, entropy_C = self.log_prob_C.clone().requires_grad_(), self.entropy_C.clone().requires_grad_()
        leaves, divergence_C = [log_prob_C, entropy_C], self.divergence_C
        with torch.set_grad_enabled(differentiate):
            if self._divergence is not None:
                tokens = TokenSums(log_prob_C, self._log_total_C, self.teacher_log_prob_C, self._teacher_log_total_C)
                leaf, divergence_C = self._divergence.value(self._divergence_sums_KC, tokens, self._targets_C, rows)
                leaves.append(leaf)
                self.divergence_C = divergence_C.detach()
            known = HeadTokens(log_prob_C, entropy_C, divergence_C, self.teacher_log_prob_C, self.teacher_entropy_C)
            losses_C = token_loss(known, rows)
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
        """dL/dlogits from the derivatives in log-prob (g), entropy (h) and the divergence's leaf.

        d log p_t / dz_v = 1[v = t] - p_v; dH / dz_v = -p_v (log p_v + H) with p_v = e_v / s.
        """
        terms: list[LogitsTerms] = []
        if g_C is not None:
            terms.append(LogitsTerms(-g_C))
        if h_C is not None:
            terms.append(LogitsTerms(h_C * (self._log_total_C - self.entropy_C), product_row_C=-h_C))
        if d_leaf is not None:
            assert self._divergence is not None
            terms.append(self._divergence.logits_terms(d_leaf))
        targets = None if g_C is None else (self._targets_C, g_C)
        return self._logits.gradient(terms, targets, self._total_C, self._temperature, self._shard)
