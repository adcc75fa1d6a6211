"""Test problems for the output head, one for each of its losses, to run with either implementation of a chunk.

S rows, T loss rows, D of them with a teacher, H and G hidden of student and teacher, V columns of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.vocab_parallel import (
    ClippedForwardKL,
    ExactForwardKL,
    ExactReverseKL,
    HeadTokens,
    JensenShannon,
    KnownTopK,
    TeacherInputs,
    TopKForwardKL,
    TopKJensenShannon,
    TopKReverseKL,
    TopKUnbiased,
    VocabShard,
    fused_head,
)
from kdrl_mcore.vocab_parallel.top_k import TopKDivergence


def _on_teachers_set(form: Any, tail: str, _: Tensor) -> Any:
    return form(5, "teacher", tail, *([0.3] if form is TopKJensenShannon else []))


KNOWN: dict[str, Any] = {
    f"known_{form.__name__}_{tail}": partial(_on_teachers_set, form, tail)
    for form in (TopKReverseKL, TopKForwardKL, TopKJensenShannon)
    for tail in form.tails
}
"""The divergences that need only the teacher's most likely tokens, in the form of `HEADS`."""

HEADS: dict[str, Any] = {
    "log_prob_entropy_k2": None,
    "exact": lambda sampler_T: ExactReverseKL(),
    "forward": lambda sampler_T: ExactForwardKL(),
    "clipped_0.1": lambda sampler_T: ClippedForwardKL(0.1),
    "mixed_0.2": lambda sampler_T: JensenShannon(0.2),
    "top_k_student_truncate": lambda sampler_T: TopKReverseKL(5, "student", "truncate"),
    "top_k_teacher_renormalize": lambda sampler_T: TopKReverseKL(5, "teacher", "renormalize"),
    "top_k_student_bucket": lambda sampler_T: TopKReverseKL(5, "student", "bucket"),
    "top_k_teacher_corrected": lambda sampler_T: TopKReverseKL(5, "teacher", "corrected"),
    "forward_top_k_teacher_truncate": lambda sampler_T: TopKForwardKL(5, "teacher", "truncate"),
    "jsd_top_k_teacher_bucket": lambda sampler_T: TopKJensenShannon(5, "teacher", "bucket", 0.3),
    "forward_top_k_student_bucket": lambda sampler_T: TopKForwardKL(5, "student", "bucket"),
    "top_k_unbiased": lambda sampler_T: TopKUnbiased(5, sampler_T),
}
"""log mu of the targets [T] -> divergence; None without a teacher."""


@dataclass(frozen=True)
class Sizes:
    """`columns` per rank, of which `size` in all are real tokens; the logits have a standard deviation of `spread`."""

    columns: int
    size: int
    tokens: int = 5
    taught: int = 3
    hidden: int = 9
    spread: float = 2.0
    chunk_tokens: int | None = None


def run_head(
    name: str,
    sizes: Sizes,
    dtype: torch.dtype,
    kernels: Any,
    group: Any = None,
    rank: int = 0,
    device: str = "cpu",
    known: bool = False,
) -> dict[str, Tensor]:
    """Outputs and gradients of one head on seeded inputs, at a temperature, with a loss that weights every output.

    Args:
        known: give the pass the teacher's most likely tokens with their log-probs, instead of hidden states and a head. Then
            the loss does not use the teacher's entropy.
    """
    shared, own = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4 + rank)

    def normal(*shape: int, generator: torch.Generator = shared, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    tokens, scale = sizes.tokens, sizes.spread * sizes.hidden**-0.5
    hidden_SH = normal(tokens + 2, sizes.hidden).requires_grad_()
    weight_VH = normal(sizes.columns, sizes.hidden, generator=own, scale=scale).requires_grad_()
    teacher_DG = normal(sizes.taught, sizes.hidden + 2)
    teacher_VG = normal(sizes.columns, sizes.hidden + 2, generator=own, scale=scale)
    rows_T = torch.randperm(tokens + 2, generator=shared)[:tokens].to(device)
    targets_T = torch.randint(0, sizes.size, (tokens,), generator=shared).to(device)
    advantages_T = torch.randn(tokens, generator=shared).to(device)
    sampler_T = torch.randn(tokens, generator=shared).sub(4).to(device)
    shard = VocabShard(group, rank * sizes.columns, (rank + 1) * sizes.columns, sizes.size)

    def loss_C(one: HeadTokens, rows: slice) -> Tensor:
        log_probs_C = one.log_probs
        surrogate_C = -(log_probs_C - log_probs_C.detach()).exp() * advantages_T[rows]
        k2_C = 0.5 * (sampler_T[rows] - log_probs_C).square()
        if one.teacher_entropies is not None:
            assert not known
            k2_C = k2_C * (1 + one.teacher_entropies)
        return surrogate_C + 0.1 * k2_C - 0.05 * one.entropies + advantages_T[rows] * one.divergences

    divergence = {**HEADS, **KNOWN}[name]
    with_entropy = name != "top_k_unbiased" and not name.startswith("known")
    teacher = None if divergence is None else TeacherInputs(teacher_DG, teacher_VG, divergence(sampler_T), with_entropy)
    outputs = fused_head(
        hidden_SH,
        weight_VH,
        rows_T,
        targets_T,
        loss_C,
        shard,
        temperature=0.7,
        teacher=None if teacher is None else as_known(teacher, targets_T, shard) if known else teacher,
        chunk_tokens=sizes.chunk_tokens,
        kernels=kernels,
    )
    outputs.loss.backward()
    results = {key: value.detach() for key, value in outputs._asdict().items() if value is not None}
    assert hidden_SH.grad is not None and weight_VH.grad is not None
    return {**results, "d_hidden": hidden_SH.grad, "d_weight": weight_VH.grad}


def as_known(teacher: TeacherInputs, targets_T: Tensor, shard: VocabShard) -> KnownTopK:
    """The same teacher, of which only the most likely tokens and the targets are known: plain softmax in float64."""
    assert isinstance(teacher.divergence, TopKDivergence)
    logits_DV = teacher.hidden_DG.double() @ teacher.weight_VG.double().T / 0.7
    if shard.group is not None:
        parts = [torch.empty_like(logits_DV) for _ in range(shard.ranks)]
        dist.all_gather(parts, logits_DV, group=shard.group)
        logits_DV = torch.cat(parts, dim=1)
    log_q_DV = logits_DV[:, : shard.size].log_softmax(1)
    log_q_DK, ids_DK = log_q_DV.topk(teacher.divergence.k)
    log_probs_D = log_q_DV.gather(1, targets_T[: len(log_q_DV), None]).squeeze(1)
    return KnownTopK(ids_DK, log_q_DK.float(), log_probs_D.float(), teacher.divergence)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rounding: float) -> None:
    """Equal to within a few roundings of the largest element: where a gradient nearly cancels, the rounding errors of its terms
    remain.

    Args:
        rounding: unit roundoff of the matrix products, for the gradients; statistics are always float32.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        eps = rounding if name.startswith("d_") else 1e-6
        bound = 4 * eps * max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        torch.testing.assert_close(
            actual[name].float(), value.float(), rtol=0.0, atol=bound, msg=lambda text, n=name: f"{n}: {text}"
        )
