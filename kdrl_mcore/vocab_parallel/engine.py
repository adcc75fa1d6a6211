"""The one pass over the output head that every loss here shares, at the memory of one chunk of logits.

The loss is a sum over tokens, so a chunk of tokens can be finished at once: its logits, the few numbers per token that the
ranks must agree on, the caller's loss of each token, the derivative of that small vector, the derivative of the logits (in
their own buffer) and from it the chunk's part of dX and dW. Nothing is recomputed: 6*T*H*V/tp FLOP for loss and gradients,
2*T*H*V/tp without gradients, and 2*D*G*V/tp for a teacher. Memory: dX, dW and a few buffers of one chunk.

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

from kdrl_mcore.vocab_parallel.chunk import Chunk, ChunkLoss, Kernels, logits_memory
from kdrl_mcore.vocab_parallel.collectives import gather_sequence, reduce_scatter_sequence, sum_over_ranks
from kdrl_mcore.vocab_parallel.comparison import Compare
from kdrl_mcore.vocab_parallel.products import add_product
from kdrl_mcore.vocab_parallel.shard import VocabShard

CHUNK_BYTES = 64 * 2**20
"""What one float32 buffer of a chunk may take, unless that is fewer rows than the matrix products need."""
LEAST_CHUNK_ROWS = {"cpu": 256, "cuda": 4096}
"""With fewer rows the products wait for the weight and dW to pass through memory.

A chunk costs 2*C*H*V FLOP each for its logits, dX and dW (V columns of the rank). Its memory traffic in bfloat16 is 12*H*V
bytes: the weight read twice (2 each), dW read and written in float32 (8); and 12*C*V: each logit written (2), read for the
statistics (2), overwritten by the derivative (4), which two products read (4). On an H100 (989 TFLOP/s, 3.35 TB/s) the traffic
takes 590 * (1/C + 1/H) of the products' time: all of it at 700 rows with H 4096, 0.29 at 4096 rows. A teacher adds 2*C*G*V
FLOP, 2*G*V and 6*C*V bytes.
"""


def default_chunk_tokens(shard: VocabShard, device: torch.device) -> int:
    """Rows per chunk: as many as `CHUNK_BYTES` holds of one rank's float32 logits, but at least `LEAST_CHUNK_ROWS`.

    A function of the whole vocabulary and the number of ranks, not of this rank's columns: all ranks must cut alike.
    """
    columns = -(-shard.size // shard.ranks)
    return max(LEAST_CHUNK_ROWS.get(device.type, 4096), CHUNK_BYTES // (4 * columns))


@dataclass(frozen=True)
class Teacher:
    """What gives the teacher's logits, and what to do with them.

    Attributes:
        hidden_DG: its last hidden states of the first D loss rows. The divergence of the other rows is 0 and costs nothing.
        weight_VG: its head in the student's vocab-parallel layout; columns beyond the student's real ones are not used.
        compare: the divergence.
    """

    hidden_DG: Tensor
    weight_VG: Tensor
    compare: Compare


class HeadOutputs(NamedTuple):
    """What a pass over the head gives; only the loss can have a gradient.

    Attributes:
        log_probs, entropies, divergences, teacher_log_probs: [T]; the last two are 0 where there is no teacher.
    """

    loss: Tensor
    log_probs: Tensor
    entropies: Tensor
    divergences: Tensor
    teacher_log_probs: Tensor


@dataclass(frozen=True)
class HeadPass:
    """One pass over the head: everything but the two tensors that get gradients.

    Attributes:
        chunk_tokens: None is `default_chunk_tokens`.
        chunk_loss: None for log-probs and entropies alone.
    """

    rows_T: Tensor
    targets_T: Tensor
    shard: VocabShard
    temperature: float
    sequence_parallel: bool
    chunk_tokens: int | None
    chunk_loss: ChunkLoss | None = None
    teacher: Teacher | None = None
    kernels: Kernels = "auto"

    def run(self, hidden_SH: Tensor, weight_VH: Tensor) -> HeadOutputs:
        """Run all chunks.

        Where grad mode is off or neither argument requires a gradient, only the forward work is done.

        Collectives over the shard's group: those of `Chunk` for each chunk; under sequence parallelism an all-gather of the
        hidden states; backward a SUM all-reduce of dX [T, H], under sequence parallelism a reduce-scatter of [S, H].

        Raises:
            ValueError: shapes, types or targets do not fit.
        """
        self._check(hidden_SH, weight_VH)
        if torch.is_grad_enabled() and (hidden_SH.requires_grad or weight_VH.requires_grad):
            return HeadOutputs(*_FusedHead.apply(hidden_SH, weight_VH, self))
        with torch.no_grad():
            return _run(self, hidden_SH, weight_VH, (False, False))[0]

    def _check(self, hidden_SH: Tensor, weight_VH: Tensor) -> None:
        columns = self.shard.stop - self.shard.start
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
            self._check_teacher(self.teacher.hidden_DG, self.teacher.weight_VG)

    def _check_teacher(self, hidden_DG: Tensor, weight_VG: Tensor) -> None:
        if len(hidden_DG) > len(self.rows_T) or hidden_DG.size(1) != weight_VG.size(1) or hidden_DG.dtype != weight_VG.dtype:
            raise ValueError(
                f"teacher hidden states {tuple(hidden_DG.shape)} {hidden_DG.dtype} and head {tuple(weight_VG.shape)} "
                f"{weight_VG.dtype} do not fit: expected [at most {len(self.rows_T)}, G] and [columns, G] of one type"
            )
        if weight_VG.size(0) < self.shard.real_columns:
            raise ValueError(
                f"the teacher's head has {weight_VG.size(0)} columns on this rank, fewer than the student's "
                f"{self.shard.real_columns}: load it in the student's vocab-parallel layout"
            )


@dataclass
class _Gradients:
    """dL/d(the hidden states of the loss rows), not yet summed over ranks, and dL/dweight; None where not wanted.

    Attributes:
        weight_written: whether a chunk has written its part of dL/dweight; until then it holds nothing (zeroing it first would
            cost a pass over its memory).
    """

    rows_TH: Tensor | None
    weight_VH: Tensor | None
    weight_written: bool = False

    def finish(self, real: int, dtype: torch.dtype) -> None:
        """All chunks are done: rows of dL/dweight that none has written are zero."""
        if self.weight_VH is not None:
            self.weight_VH[real if self.weight_written else 0 :].zero_()
            self.weight_VH = self.weight_VH.to(dtype)


class _FusedHead(torch.autograd.Function):
    """Forms dX and dW in the forward pass; backward multiplies them by the incoming gradient and sums dX over the group."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, head: HeadPass) -> tuple[Tensor, ...]:
        outputs, gradients = _run(head, hidden_SH, weight_VH, ctx.needs_input_grad[:2])
        # Not the whole pass: it would keep the teacher's hidden states alive.
        ctx.spread = partial(_spread_rows, head.rows_T, head.shard, head.sequence_parallel, len(hidden_SH))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("the fused head's gradient, formed in the forward pass, is used up: run the forward pass again")
        # Scaled in place and handed over, so that dW never exists twice; hence one backward pass for each forward pass.
        ctx.gradients = None
        scale = outputs[0]
        # Megatron-Core's schedules pass 1; on CUDA looking would wait for the device.
        if scale.device.type != "cpu" or scale != 1:
            for gradient in (gradients.rows_TH, gradients.weight_VH):
                if gradient is not None:
                    gradient.mul_(scale)
        d_hidden_SH = None if gradients.rows_TH is None else ctx.spread(gradients.rows_TH)
        return d_hidden_SH, gradients.weight_VH, None


def _spread_rows(rows_T: Tensor, shard: VocabShard, sequence_parallel: bool, rows: int, d_rows_TH: Tensor) -> Tensor:
    """dL/dhidden of this rank's `rows` rows, from every rank's part of the loss rows."""
    if not sequence_parallel:
        d_rows_TH = sum_over_ranks(d_rows_TH, shard)
        return d_rows_TH.new_zeros(rows, d_rows_TH.size(1)).index_add_(0, rows_T, d_rows_TH)
    d_hidden_SH = d_rows_TH.new_zeros(rows * shard.ranks, d_rows_TH.size(1)).index_add_(0, rows_T, d_rows_TH)
    return reduce_scatter_sequence(d_hidden_SH, shard)


def _cut(num_taught: int, num_tokens: int, size: int) -> list[slice]:
    """The chunks' rows: a chunk has a teacher in all of its rows or in none. Without tokens one empty chunk."""
    if num_tokens == 0:
        return [slice(0, 0)]
    starts = [*range(0, num_taught, size), *range(num_taught, num_tokens, size)]
    return [slice(start, stop) for start, stop in pairwise([*starts, num_tokens])]


def _run(head: HeadPass, hidden_SH: Tensor, weight_VH: Tensor, wanted: tuple[bool, bool]) -> tuple[HeadOutputs, _Gradients]:
    """All chunks. `wanted`: which of dX and dW to form. Without tokens one empty chunk is run, so that the loss is called."""
    if head.sequence_parallel:
        hidden_SH = gather_sequence(hidden_SH, head.shard)
    num_tokens, real = len(head.rows_T), head.shard.real_columns
    size = min(num_tokens, head.chunk_tokens or default_chunk_tokens(head.shard, weight_VH.device))
    teacher = head.teacher if head.teacher is not None and len(head.teacher.hidden_DG) else None
    num_taught = 0 if teacher is None else len(teacher.hidden_DG)
    memory = logits_memory(
        head.kernels, size, real, weight_VH.dtype, None if teacher is None else teacher.weight_VG.dtype, weight_VH.device
    )
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    gradients = _Gradients(
        hidden_SH.new_zeros(num_tokens, hidden_SH.size(1)) if wanted[0] else None,
        torch.empty_like(weight_VH, dtype=wide) if wanted[1] else None,
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
            (teacher.hidden_DG[rows], teacher.weight_VG, teacher.compare)
            if teacher is not None and rows.stop <= num_taught
            else None,
        )
        if head.chunk_loss is not None:
            value, d_logits_CV = chunk.loss(head.chunk_loss, rows, differentiate=any(wanted))
            loss += value
            if d_logits_CV is not None:
                _accumulate(gradients, d_logits_CV, hidden_CH, weight_VH[: d_logits_CV.size(1)], rows)
        measured.append((chunk.log_prob_C, chunk.entropy_C, chunk.divergence_C, chunk.teacher_log_prob_C))
    gradients.finish(real, weight_VH.dtype)
    return HeadOutputs(loss, *(torch.cat(parts) for parts in zip(*measured, strict=True))), gradients


def _accumulate(gradients: _Gradients, d_logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, rows: slice) -> None:
    """The chunk's dX, and its share of dW, which is added up in at least float32 without a second [V, H]."""
    if gradients.rows_TH is not None:
        torch.mm(d_logits_CV, weight_VH, out=gradients.rows_TH[rows])
    if gradients.weight_VH is not None:
        first, gradients.weight_written = not gradients.weight_written, True
        add_product(gradients.weight_VH[: len(weight_VH)], d_logits_CV.T, hidden_CH, first=first)
