"""Log-probs, entropies and divergences computed the plain way, and the same problem given to the vocab-parallel functions.

The reference is dense float64 autograd on whole logits and shares no code with kdrl_mcore.

S rows of the sequence, T loss rows, the first D of them with a teacher, H hidden, G the teacher's hidden, V real tokens,
P columns with padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.vocab_parallel import (
    VocabShard,
    fused_exact_reverse_kl,
    fused_head,
    fused_top_k_reverse_kl,
    fused_top_k_unbiased,
    token_log_probs_and_entropy,
)

TAILS = ("truncate", "renormalize", "bucket")
TOP_K = tuple(f"top_k {support} {tail}" for support in ("student", "teacher") for tail in TAILS)
KINDS = ("logits", "head", "exact", *TOP_K, "top_k_unbiased")
"""Everything that has a loss: "logits" forms them whole, the others are fused."""


@dataclass(frozen=True)
class Problem:
    """One pass over the head, whole; the same on every rank. Weights have the real rows only: padding is the layout's."""

    hidden_SH: Tensor
    weight_VH: Tensor
    teacher_hidden_DG: Tensor
    teacher_weight_VG: Tensor
    rows_T: Tensor
    targets_T: Tensor
    sampler_log_probs_T: Tensor
    factors_T4: Tensor
    temperature: float
    top_k: int

    def to(self, dtype: torch.dtype) -> Problem:
        """The problem with every real number rounded to `dtype`."""
        real = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value.to(dtype) for name, value in real.items() if value.is_floating_point()})

    def loss(self, log_probs_C: Tensor, entropy_C: Tensor, divergence_C: Tensor, rows: slice) -> Tensor:
        """Nonlinear in all three, different for each token."""
        a_C, b_C, c_C, d_C = self.factors_T4[rows].to(log_probs_C.dtype).unbind(1)
        return (
            a_C * (0.3 * log_probs_C).exp() + b_C * entropy_C.square() + c_C * divergence_C * log_probs_C + d_C * divergence_C
        )


@dataclass(frozen=True)
class Layout:
    """How the problem is spread: `columns` of the padded vocabulary over `ranks`, and how the rows are cut."""

    ranks: int = 1
    columns: int = 23
    sequence_parallel: bool = False
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """Loss, values [T] and gradients; of a rank, the gradient of its part of the hidden states and of its columns."""

    loss: Tensor
    log_probs_T: Tensor
    entropy_T: Tensor
    divergence_T: Tensor
    teacher_log_prob_T: Tensor
    d_hidden_SH: Tensor
    d_weight_VH: Tensor


def make_problem(num_tokens: int = 9, num_taught: int = 9, *, top_k: int = 5, scale: float = 1.0) -> Problem:
    """S = 16, H = 6, G = 5, V = 23 in float64. Loss rows are out of order, one of them stands twice, and every other row of the
    hidden states is NaN: a row without a loss must reach nothing."""
    random = torch.Generator().manual_seed(7)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    rows_T = torch.tensor([14, 3, 0, 9, 5, 3, 12, 8, 1])[:num_tokens]
    hidden_SH = torch.full((16, 6), torch.nan, dtype=torch.float64)
    hidden_SH[rows_T] = normal(16, 6)[rows_T]
    return Problem(
        hidden_SH,
        scale * normal(23, 6),
        normal(9, 5)[:num_taught],
        scale * normal(23, 5),
        rows_T,
        torch.randint(0, 23, (9,), generator=random)[:num_tokens],
        normal(9)[:num_tokens] * 0.3 - 2.0,
        normal(9, 4)[:num_tokens],
        temperature=1.3,
        top_k=top_k,
    )


def dense(problem: Problem, kind: str) -> Answer:
    """The whole answer in float64 from whole logits."""
    p = problem.to(torch.float64)
    hidden_SH, weight_VH = p.hidden_SH.clone().requires_grad_(), p.weight_VH.clone().requires_grad_()
    log_p_TV = (hidden_SH[p.rows_T] @ weight_VH.T / p.temperature).log_softmax(1)
    log_prob_T = log_p_TV.gather(1, p.targets_T[:, None]).squeeze(1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(1)
    log_q_DV = (p.teacher_hidden_DG @ p.teacher_weight_VG.T / p.temperature).log_softmax(1)
    num_taught = 0 if kind in ("logits", "head") else len(log_q_DV)
    divergence_T = teacher_log_prob_T = torch.zeros_like(log_prob_T)
    if num_taught:
        taught_D = dense_divergence(p, kind, log_p_TV[:num_taught], log_q_DV, log_prob_T[:num_taught])
        divergence_T = torch.cat((taught_D, divergence_T[num_taught:]))
        told_D = log_q_DV.gather(1, p.targets_T[:num_taught, None]).squeeze(1)
        teacher_log_prob_T = torch.cat((told_D, teacher_log_prob_T[num_taught:]))
    loss = p.loss(log_prob_T, entropy_T, divergence_T, slice(None)).sum()
    gradients = torch.autograd.grad(loss, (hidden_SH, weight_VH))
    return Answer(
        loss.detach(), log_prob_T.detach(), entropy_T.detach(), divergence_T.detach(), teacher_log_prob_T.detach(), *gradients
    )


def dense_divergence(p: Problem, kind: str, log_p_DV: Tensor, log_q_DV: Tensor, log_prob_D: Tensor) -> Tensor:
    """The divergence [D] (of top_k_unbiased its surrogate) from all log-probs of student and teacher."""
    if kind == "exact":
        return (log_p_DV.exp() * (log_p_DV - log_q_DV)).sum(1)
    ranked_DV = log_q_DV if "teacher" in kind else log_p_DV
    set_DK = ranked_DV.sort(dim=1, descending=True, stable=True).indices[:, : p.top_k]
    log_p_DK, log_q_DK = log_p_DV.gather(1, set_DK), log_q_DV.gather(1, set_DK)
    if kind == "top_k_unbiased":
        targets_D, mu_D = p.targets_T[: len(log_p_DV)], p.sampler_log_probs_T[: len(log_p_DV)]
        inside_D = ((log_p_DK.exp() * (log_p_DK - log_q_DK)).detach() * log_p_DK).sum(1)
        d_D = log_q_DV.gather(1, targets_D[:, None]).squeeze(1) - log_prob_D
        outside_D = (set_DK != targets_D[:, None]).all(1).double()
        return inside_D + outside_D * (log_prob_D - mu_D).exp().detach() * 0.5 * d_D.square()
    if kind.endswith("renormalize"):
        log_p_DK, log_q_DK = log_p_DK.log_softmax(1), log_q_DK.log_softmax(1)
    inside_D = (log_p_DK.exp() * (log_p_DK - log_q_DK)).sum(1)
    if not kind.endswith("bucket"):
        return inside_D
    outside_DV = torch.ones_like(log_p_DV).scatter(1, set_DK, 0.0)
    p_out_D, q_out_D = (log_p_DV.exp() * outside_DV).sum(1), (log_q_DV.exp() * outside_DV).sum(1)
    tiny = torch.finfo(torch.float64).tiny
    return inside_D + p_out_D * (p_out_D.clamp_min(tiny).log() - q_out_D.clamp_min(tiny).log())


def shard_of(layout: Layout, size: int) -> VocabShard:
    """This rank's equal part of the padded vocabulary; the group is the whole world."""
    rank, width = (dist.get_rank(), layout.columns // layout.ranks) if layout.ranks > 1 else (0, layout.columns)
    return VocabShard(dist.group.WORLD if layout.ranks > 1 else None, rank * width, (rank + 1) * width, size)


def own_part(problem: Problem, layout: Layout, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, weight, teacher's weight) as this rank holds them. Padding is NaN, as it must touch nothing, and the
    teacher's head is padded differently."""

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
    """(loss, log-probs, entropy, divergence, the teacher's log-probs) of the function under test."""
    p = problem
    if kind == "logits":
        # Here the product is the caller's, for whom a padding of NaN would be his own fault; the logits' padding may be NaN.
        logits_TP = hidden_SH[p.rows_T] @ weight_PH.nan_to_num().T
        logits_TP = logits_TP.masked_fill(torch.arange(logits_TP.size(1)) >= shard.real_columns, torch.nan)
        log_probs_T, entropy_T = token_log_probs_and_entropy(logits_TP, p.targets_T, shard, p.temperature)
        zero_T = torch.zeros_like(log_probs_T)
        return p.loss(log_probs_T, entropy_T, zero_T, slice(None)).sum(), log_probs_T, entropy_T, zero_T, zero_T
    options: dict[str, Any] = {
        "temperature": p.temperature,
        "sequence_parallel": layout.sequence_parallel,
        "chunk_tokens": layout.chunk_tokens,
    }
    if kind == "head":
        loss, log_probs_T, entropy_T = fused_head(
            hidden_SH,
            weight_PH,
            p.rows_T,
            p.targets_T,
            lambda log_probs_C, entropy_C, rows: p.loss(log_probs_C, entropy_C, torch.zeros_like(entropy_C), rows),
            shard,
            **options,
        )
        return loss, log_probs_T, entropy_T, torch.zeros_like(log_probs_T), torch.zeros_like(log_probs_T)
    function: Any = fused_exact_reverse_kl
    if kind == "top_k_unbiased":
        function = partial(fused_top_k_unbiased, top_k=p.top_k, sampler_log_probs_T=p.sampler_log_probs_T)
    elif kind != "exact":
        _, support, tail = kind.split()
        function = partial(fused_top_k_reverse_kl, top_k=p.top_k, support=support, tail=tail)
    return function(hidden_SH, weight_PH, p.teacher_hidden_DG, teacher_PG, p.rows_T, p.targets_T, p.loss, shard, **options)


def answer(problem: Problem, kind: str, layout: Layout) -> Answer:
    """This rank's answer of the function under test. The loss is scaled before the backward pass, and the gradients back, so
    that an ignored incoming gradient shows."""
    shard = shard_of(layout, len(problem.weight_VH))
    hidden_SH, weight_PH, teacher_PG = own_part(problem, layout, shard)
    leaves = hidden_SH.clone().requires_grad_(), weight_PH.clone().requires_grad_()
    loss, *values = call(kind, problem, layout, shard, *leaves, teacher_PG)
    d_hidden_SH, d_weight_PH = torch.autograd.grad(4.0 * loss, leaves)
    if kind == "logits" and layout.ranks > 1:
        # The caller's own product: its gradient is this rank's part, as in any column-parallel linear layer.
        dist.all_reduce(d_hidden_SH)
    return Answer(loss.detach(), *(value.detach() for value in values), d_hidden_SH / 4.0, d_weight_PH / 4.0)


def assert_same(answers: list[Answer], expected: Answer, layout: Layout, **tolerance: float) -> None:
    """Every rank has the expected numbers, the gradients put together are the expected ones, and padding got none."""
    for one in answers:
        for name in ("loss", "log_probs_T", "entropy_T", "divergence_T"):
            torch.testing.assert_close(getattr(one, name).double(), getattr(expected, name), **tolerance)
    parts = [one.d_hidden_SH.double() for one in answers]
    for d_hidden_SH in [torch.cat(parts)] if layout.sequence_parallel else parts:
        torch.testing.assert_close(d_hidden_SH, expected.d_hidden_SH, **tolerance)
    d_weight_PH = torch.cat([one.d_weight_VH.double() for one in answers])
    size = len(expected.d_weight_VH)
    torch.testing.assert_close(d_weight_PH[:size], expected.d_weight_VH, **tolerance)
    assert not d_weight_PH[size:].any()
