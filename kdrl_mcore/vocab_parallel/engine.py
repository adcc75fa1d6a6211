"""The pass over the output head that all losses share. It needs the memory of only one chunk of logits.

The loss is a sum over tokens, so each chunk of tokens can be completed before the next: its logits, the few numbers per token
that are reduced over the ranks, the caller's loss of each token, the derivative of that small vector, the derivative of the
logits (which overwrites them), and from it the chunk's contribution to dX and dW. Nothing is recomputed: 6*T*H*V/tp FLOP for
loss and gradients, 2*T*H*V/tp without gradients, and 2*D*G*V/tp for a teacher. Memory: dX, dW and a few buffers of one chunk.

S rows of the sequence, T loss rows, the first D of them with a teacher, C rows of a chunk, H hidden, G the teacher's hidden,
V vocabulary columns of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdrl_mcore.vocab_parallel.chunk import Chunk, Kernels, TokenLoss, logits_memory
from kdrl_mcore.vocab_parallel.collectives import gather_sequence, reduce_scatter_sequence, sum_over_ranks
from kdrl_mcore.vocab_parallel.divergence import TeacherSide
from kdrl_mcore.vocab_parallel.exact import ExactReverseKL
from kdrl_mcore.vocab_parallel.products import add_product
from kdrl_mcore.vocab_parallel.shard import VocabShard
from kdrl_mcore.vocab_parallel.support import Support

CHUNK_BYTES = 64 * 2**20
"""The size of one float32 buffer of a chunk, unless that is fewer rows than the matrix products need."""
LEAST_CHUNK_ROWS = {"cpu": 256, "cuda": 4096}
"""With fewer rows, the matrix products are bound by the memory traffic of the weight and dW.

A chunk costs 2*C*H*V FLOP each for its logits, dX and dW (V columns of the rank). Its memory traffic in bfloat16 is 12*H*V
bytes: the weight read twice (2 each), dW read and written in float32 (8); and 12*C*V: each logit written (2), read for the
statistics (2), overwritten by the derivative (4), which two products read (4). On an H100 (989 TFLOP/s, 3.35 TB/s) the traffic
takes 590 * (1/C + 1/H) of the products' time: all of it at 700 rows with H 4096, 0.29 at 4096 rows. A teacher adds 2*C*G*V
FLOP, 2*G*V and 6*C*V bytes.
"""


def default_chunk_tokens(shard: VocabShard, device: torch.device) -> int:
    """Rows per chunk: as many rows of one rank's float32 logits as fit in `CHUNK_BYTES`, but at least `LEAST_CHUNK_ROWS`.

    It depends on the whole vocabulary and the number of ranks, not on this rank's columns: all ranks must use the same chunks.
    """
    columns = -(-shard.size // shard.ranks)
    return max(LEAST_CHUNK_ROWS.get(device.type, 4096), CHUNK_BYTES // (4 * columns))


class HeadOutputs(NamedTuple):
    """The outputs of a pass over the head; only the loss can have a gradient.

    Attributes:
        log_probs, entropies, divergences, teacher_log_probs: [T]; the last two are 0 for rows without a teacher.
        teacher_entropies: [T], 0 for rows without a teacher; None unless asked for.
    """

    loss: Tensor
    log_probs: Tensor
    entropies: Tensor
    divergences: Tensor
    teacher_log_probs: Tensor
    teacher_entropies: Tensor | None = None


@dataclass(frozen=True)
class HeadPass:
    """The inputs of one pass over the head, except the tensors that get gradients.

    Attributes:
        chunk_tokens: rows per chunk; None means `default_chunk_tokens`.
        token_loss: None to compute only log-probs and entropies.
        support: the student's distribution is truncated to it; None or a whole one leaves it as it is.
    """

    rows_T: Tensor
    targets_T: Tensor
    shard: VocabShard
    temperature: float
    sequence_parallel: bool
    chunk_tokens: int | None
    token_loss: TokenLoss | None = None
    teacher: TeacherSide | None = None
    kernels: Kernels = "auto"
    support: Support | None = None

    def run(self, hidden_SH: Tensor, weight_VH: Tensor, adapter_VR: Tensor | None = None) -> HeadOutputs:
        """Run all chunks.

        If grad mode is off or no argument requires a gradient, only the forward work is done.

        Args:
            adapter_VR: further columns of a frozen weight, trained in its place; the hidden states have H + R columns.

        Collectives over the shard's group: those of `Chunk` for each chunk; under sequence parallelism an all-gather of the
        hidden states; backward a SUM all-reduce of dX [T, H], or under sequence parallelism a reduce-scatter of [S, H].

        Raises:
            ValueError: shapes, types or targets do not fit.
        """
        self._check(hidden_SH, weight_VH, adapter_VR)
        trained = weight_VH if adapter_VR is None else adapter_VR
        if torch.is_grad_enabled() and (hidden_SH.requires_grad or trained.requires_grad):
            return HeadOutputs(*_FusedHead.apply(hidden_SH, trained, None if adapter_VR is None else weight_VH, self))
        with torch.no_grad():
            return _run(self, hidden_SH, trained, None if adapter_VR is None else weight_VH, (False, False))[0]

    def _check(self, hidden_SH: Tensor, weight_VH: Tensor, adapter_VR: Tensor | None) -> None:
        columns = self.shard.stop - self.shard.start
        if adapter_VR is not None:
            if weight_VH.requires_grad or adapter_VR.dim() != 2 or adapter_VR.dtype != weight_VH.dtype:
                raise ValueError("an adapter of the head has two dimensions and the type of the weight, which must be frozen")
            weight_VH = torch.empty(
                len(adapter_VR), weight_VH.size(1) + adapter_VR.size(1), dtype=weight_VH.dtype, device="meta"
            )
        if hidden_SH.dim() != 2 or weight_VH.shape != (columns, hidden_SH.size(1)):
            raise ValueError(
                f"hidden states {tuple(hidden_SH.shape)} and head weight {tuple(weight_VH.shape)} do not fit: expected [S, H] "
                f"and [{columns}, H], the columns {self.shard.start} to {self.shard.stop} of the shard"
            )
        if hidden_SH.dtype != weight_VH.dtype:
            raise ValueError(f"hidden states are {hidden_SH.dtype} and the head weight is {weight_VH.dtype}: cast one of them")
        if self.rows_T.dim() != 1 or self.rows_T.shape != self.targets_T.shape:
            raise ValueError(
                f"rows {tuple(self.rows_T.shape)} and targets {tuple(self.targets_T.shape)} must be vectors of one length"
            )
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}: it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be positive")
        self.shard.check_targets(self.targets_T)
        if self.teacher is not None:
            self.teacher.check(len(self.rows_T), self.shard)
            truncated = self.support is not None and not self.support.is_whole
            if truncated and not isinstance(self.teacher.divergence, ExactReverseKL):
                raise ValueError(
                    f"{type(self.teacher.divergence).__name__} is not for a student that top_p, top_k or min_p truncate: use "
                    "ExactReverseKL"
                )


@dataclass
class _Gradients:
    """dL/d(hidden states of the loss rows), not yet summed over ranks, and dL/d(the weight or its adapter); None if not wanted.

    Attributes:
        weight_written: whether a chunk has written to dL/dweight, which is uninitialised until then (zeroing it first would
            cost a pass over its memory).
    """

    rows_TH: Tensor | None
    weight_VH: Tensor | None
    weight_written: bool = False

    def finish(self, real: int, dtype: torch.dtype) -> None:
        """Called after the last chunk: zero the rows of dL/dweight that no chunk has written, and convert it to `dtype`."""
        if self.weight_VH is not None:
            self.weight_VH[real if self.weight_written else 0 :].zero_()
            self.weight_VH = self.weight_VH.to(dtype)


class _FusedHead(torch.autograd.Function):
    """Computes dX and dW in the forward pass; backward multiplies them by the incoming gradient and sums dX over the group."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, trained_VH: Tensor, frozen_VH: Tensor | None, head: HeadPass
    ) -> tuple[Tensor | None, ...]:
        outputs, gradients = _run(head, hidden_SH, trained_VH, frozen_VH, ctx.needs_input_grad[:2])
        # Saving the whole pass would keep the teacher's hidden states alive.
        ctx.spread = partial(_spread_rows, head.rows_T, head.shard, head.sequence_parallel, len(hidden_SH))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("the fused head's gradient, formed in the forward pass, is used up: run the forward pass again")
        # Scaled in place and returned, so that dW never exists twice; this allows one backward pass per forward pass.
        ctx.gradients = None
        scale = outputs[0]
        # Megatron-Core's schedules pass 1; on CUDA, comparing would wait for the device.
        if scale.device.type != "cpu" or scale != 1:
            for gradient in (gradients.rows_TH, gradients.weight_VH):
                if gradient is not None:
                    gradient.mul_(scale)
        d_hidden_SH = None if gradients.rows_TH is None else ctx.spread(gradients.rows_TH)
        return d_hidden_SH, gradients.weight_VH, None, None


def _spread_rows(rows_T: Tensor, shard: VocabShard, sequence_parallel: bool, rows: int, d_rows_TH: Tensor) -> Tensor:
    """dL/dhidden of this rank's `rows` rows, from all ranks' contributions to the loss rows."""
    if not sequence_parallel:
        d_rows_TH = sum_over_ranks(d_rows_TH, shard)
        return d_rows_TH.new_zeros(rows, d_rows_TH.size(1)).index_add_(0, rows_T, d_rows_TH)
    d_hidden_SH = d_rows_TH.new_zeros(rows * shard.ranks, d_rows_TH.size(1)).index_add_(0, rows_T, d_rows_TH)
    return reduce_scatter_sequence(d_hidden_SH, shard)


def _cut(num_taught: int, num_tokens: int, size: int) -> list[slice]:
    """The rows of each chunk. A chunk has a teacher in all of its rows or in none; without tokens there is one empty chunk."""
    if num_tokens == 0:
        return [slice(0, 0)]
    starts = [*range(0, num_taught, size), *range(num_taught, num_tokens, size)]
    return [slice(start, stop) for start, stop in pairwise([*starts, num_tokens])]


def _run(
    head: HeadPass, hidden_SH: Tensor, trained_VH: Tensor, frozen_VH: Tensor | None, wanted: tuple[bool, bool]
) -> tuple[HeadOutputs, _Gradients]:
    """Run all chunks; `wanted` selects dX and dW, of the trained weight. Without tokens one empty chunk is run, so that the
    loss is called.

    Args:
        frozen_VH: the columns of the weight that come before the trained ones.
    """
    weight_VH = trained_VH if frozen_VH is None else torch.cat((frozen_VH, trained_VH), dim=1)
    if head.sequence_parallel:
        hidden_SH = gather_sequence(hidden_SH, head.shard)
    num_tokens, real = len(head.rows_T), head.shard.real_columns
    size = min(num_tokens, head.chunk_tokens or default_chunk_tokens(head.shard, weight_VH.device))
    teacher = head.teacher if head.teacher is not None and len(head.teacher) else None
    num_taught = 0 if teacher is None else len(teacher)
    factors = None if teacher is None else teacher.factors
    memory = logits_memory(
        head.kernels, size, real, weight_VH.dtype, None if factors is None else factors[1].dtype, weight_VH.device
    )
    teacher_entropy = head.teacher is not None and head.teacher.with_entropy
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    gradients = _Gradients(
        hidden_SH.new_zeros(num_tokens, hidden_SH.size(1)) if wanted[0] else None,
        torch.empty_like(trained_VH, dtype=wide) if wanted[1] else None,
    )
    loss = torch.zeros((), dtype=wide, device=weight_VH.device)
    measured: list[tuple[Tensor, ...]] = []
    for rows in _cut(num_taught, num_tokens, size):
        hidden_CH = hidden_SH[head.rows_T[rows]]
        chunk = Chunk(
            hidden_CH,
            weight_VH,
            head.targets_T[rows],
            head.shard,
            head.temperature,
            memory.first(len(hidden_CH)),
            teacher.of_rows(rows) if teacher is not None and rows.stop <= num_taught else None,
            teacher_entropy=teacher_entropy,
            support=head.support,
        )
        if head.token_loss is not None:
            value, d_logits_CV = chunk.loss(head.token_loss, rows, differentiate=any(wanted))
            loss += value
            if d_logits_CV is not None:
                _accumulate(gradients, d_logits_CV, hidden_CH, weight_VH[: d_logits_CV.size(1)], rows)
        values = chunk.log_prob_C, chunk.entropy_C, chunk.divergence_C, chunk.teacher_log_prob_C, chunk.teacher_entropy_C
        measured.append(tuple(value_C for value_C in values if value_C is not None))
    gradients.finish(real, weight_VH.dtype)
    return HeadOutputs(loss, *(torch.cat(parts) for parts in zip(*measured, strict=True))), gradients


def _accumulate(gradients: _Gradients, d_logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, rows: slice) -> None:
    """Write the chunk's dX and add its contribution to dW, in at least float32 and without a second [V, H]."""
    if gradients.rows_TH is not None:
        torch.mm(d_logits_CV, weight_VH, out=gradients.rows_TH[rows])
    if gradients.weight_VH is not None:
        first, gradients.weight_written = not gradients.weight_written, True
        trained_CH = hidden_CH[:, hidden_CH.size(1) - gradients.weight_VH.size(1) :]
        add_product(gradients.weight_VH[: len(weight_VH)], d_logits_CV.T, trained_CH, first=first)
