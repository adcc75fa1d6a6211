"""The reference's output-head problem (`tests.reference.output_head`), given to the vocab-parallel functions.

S rows of the sequence, T loss rows, the first D of them with a teacher, H hidden, G the teacher's hidden, V real tokens,
P columns with padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.vocab_parallel import (
    ClippedForwardKL,
    ExactForwardKL,
    ExactReverseKL,
    JensenShannon,
    TeacherInputs,
    TopKForwardKL,
    TopKJensenShannon,
    TopKReverseKL,
    TopKUnbiased,
    VocabShard,
    fused_head,
    token_log_probs_and_entropy,
)
from tests.reference.output_head import WITH_ENTROPY, Answer, Problem


@dataclass(frozen=True)
class Layout:
    """How the problem is distributed: `columns` of the padded vocabulary over `ranks`, and how the rows are split."""

    ranks: int = 1
    columns: int = 23
    sequence_parallel: bool = False
    chunk_tokens: int | None = None


def shard_of(layout: Layout, size: int) -> VocabShard:
    """This rank's equal share of the padded vocabulary; the group is the whole world."""
    rank, width = (dist.get_rank(), layout.columns // layout.ranks) if layout.ranks > 1 else (0, layout.columns)
    return VocabShard(dist.group.WORLD if layout.ranks > 1 else None, rank * width, (rank + 1) * width, size)


def own_part(problem: Problem, layout: Layout, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, weight, teacher's weight) as this rank holds them. Padding is NaN, because it must not affect anything,
    and the teacher's head is padded differently."""

    def columns(weight_VH: Tensor, more: int) -> Tensor:
        padded = torch.full((max(layout.columns, shard.stop) + more, weight_VH.size(1)), torch.nan, dtype=weight_VH.dtype)
        padded[: len(weight_VH)] = weight_VH
        return padded[shard.start : shard.stop + more]

    hidden_SH = problem.hidden_SH
    if layout.sequence_parallel:
        hidden_SH = hidden_SH.chunk(layout.ranks)[dist.get_rank()]
    return hidden_SH, columns(problem.weight_VH, 0), columns(problem.teacher_weight_VG, 3 + shard.start % 2)


def call(
    kind: str, problem: Problem, layout: Layout, shard: VocabShard, hidden_SH: Tensor, weight_PH: Tensor, teacher_PG: Tensor
) -> tuple[Tensor, ...]:
    """(loss, log-probs, entropy, divergence, the teacher's log-probs and entropies) from the function under test. Entropies
    that were not requested are 0."""
    p = problem
    if kind == "logits":
        # Here the caller computes the product, and keeping NaN padding out of it is up to him; the logits' padding may be NaN.
        logits_TP = hidden_SH[p.rows_T] @ weight_PH.nan_to_num().T
        logits_TP = logits_TP.masked_fill(torch.arange(logits_TP.size(1)) >= shard.real_columns, torch.nan)
        log_probs_T, entropy_T = token_log_probs_and_entropy(logits_TP, p.targets_T, shard, p.temperature)
        zero_T = torch.zeros_like(log_probs_T)
        return p.loss(log_probs_T, entropy_T, zero_T, slice(None)).sum(), log_probs_T, entropy_T, zero_T, zero_T, zero_T
    teacher = None
    if kind != "head":
        teacher = TeacherInputs(p.teacher_hidden_DG, teacher_PG, divergence(kind, p), with_entropy=kind in WITH_ENTROPY)
    outputs = fused_head(
        hidden_SH,
        weight_PH,
        p.rows_T,
        p.targets_T,
        lambda tokens, rows: p.loss(tokens.log_probs, tokens.entropies, tokens.divergences, rows),
        shard,
        temperature=p.temperature,
        teacher=teacher,
        sequence_parallel=layout.sequence_parallel,
        chunk_tokens=layout.chunk_tokens,
    )
    assert (outputs.teacher_entropies is None) == (kind not in WITH_ENTROPY)
    *values, entropies_T = outputs
    return *values, torch.zeros_like(outputs.log_probs) if entropies_T is None else entropies_T


def divergence(kind: str, problem: Problem) -> Any:
    """The divergence under test. For top-k divergences, the kind names the support and the tail."""
    if kind == "exact":
        return ExactReverseKL()
    if kind == "forward":
        return ExactForwardKL()
    if kind.startswith("clipped"):
        return ClippedForwardKL(float(kind.split()[1]))
    if kind.startswith("mixed"):
        return JensenShannon(float(kind.split()[1]))
    if kind == "top_k_unbiased":
        return TopKUnbiased(problem.top_k, problem.sampler_log_probs_T)
    name, support, tail = kind.split()
    if name == "jsd_top_k":
        return TopKJensenShannon(problem.top_k, support, tail, 0.3)
    form: Any = TopKForwardKL if name == "forward_top_k" else TopKReverseKL
    return form(problem.top_k, support, tail)


def answer(problem: Problem, kind: str, layout: Layout) -> Answer:
    """This rank's result from the function under test. The loss is scaled before the backward pass and the gradients are scaled
    back, so that a function that ignores its incoming gradient is caught."""
    shard = shard_of(layout, len(problem.weight_VH))
    hidden_SH, weight_PH, teacher_PG = own_part(problem, layout, shard)
    leaves = hidden_SH.clone().requires_grad_(), weight_PH.clone().requires_grad_()
    loss, *values = call(kind, problem, layout, shard, *leaves, teacher_PG)
    d_hidden_SH, d_weight_PH = torch.autograd.grad(4.0 * loss, leaves)
    if kind == "logits" and layout.ranks > 1:
        # The caller computes the product: its gradient is this rank's part, as in any column-parallel linear layer.
        dist.all_reduce(d_hidden_SH)
    return Answer(loss.detach(), *(value.detach() for value in values), d_hidden_SH / 4.0, d_weight_PH / 4.0)


def assert_same(answers: list[Answer], expected: Answer, layout: Layout, **tolerance: float) -> None:
    """Every rank has the expected numbers, the gathered gradients are the expected ones, and padding has no gradient."""
    for one in answers:
        for name in ("loss", "log_probs_T", "entropy_T", "divergence_T", "teacher_log_prob_T", "teacher_entropy_T"):
            torch.testing.assert_close(getattr(one, name).double(), getattr(expected, name), **tolerance)
    parts = [one.d_hidden_SH.double() for one in answers]
    for d_hidden_SH in [torch.cat(parts)] if layout.sequence_parallel else parts:
        torch.testing.assert_close(d_hidden_SH, expected.d_hidden_SH, **tolerance)
    d_weight_PH = torch.cat([one.d_weight_VH.double() for one in answers])
    size = len(expected.d_weight_VH)
    torch.testing.assert_close(d_weight_PH[:size], expected.d_weight_VH, **tolerance)
    assert not d_weight_PH[size:].any()
