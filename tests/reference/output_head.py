"""Log-probs, entropies and divergences of the output head computed in the plain way: dense float64 autograd on whole logits.

S rows of the sequence, T loss rows, the first D of them with a teacher, H hidden, G the teacher's hidden, V real tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

TAILS = ("truncate", "renormalize", "bucket")
TOP_K = tuple(f"top_k {support} {tail}" for support in ("student", "teacher") for tail in (*TAILS, "corrected"))
FORWARD_TOP_K = tuple(
    f"forward_top_k {case}" for case in ("teacher truncate", "student renormalize", "teacher bucket", "student bucket")
)
JSD_TOP_K = tuple(
    f"jsd_top_k {case}" for case in ("teacher truncate", "student renormalize", "teacher bucket", "student bucket")
)
"""The Jensen-Shannon divergence with beta 0.3."""
EXACT_FORM = {
    **dict.fromkeys(TOP_K, "exact"),
    **dict.fromkeys(FORWARD_TOP_K, "forward"),
    **dict.fromkeys(JSD_TOP_K, "mixed 0.3"),
}
"""The kind that each one equals if the set is the whole vocabulary."""
MIXED = ("mixed 0.3", "mixed 0.9")
WITH_ENTROPY = ("exact", "forward", "mixed 0.3", *TOP_K, *FORWARD_TOP_K, *JSD_TOP_K)
"""The kinds that also need the teacher's entropy."""
CLIPPED = "clipped 0.2"
"""The forward KL with a bound of its entries."""
KINDS = ("logits", "head", "exact", "forward", CLIPPED, *MIXED, *TOP_K, *FORWARD_TOP_K, *JSD_TOP_K, "top_k_unbiased")
"""Everything that has a loss: "logits" forms them whole, the others are fused. "mixed" names beta of the Jensen-Shannon
divergence."""


@dataclass(frozen=True)
class Problem:
    """One whole pass over the head; the same on every rank. Weights have only the real rows: the layout adds padding."""

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
        """A loss that is nonlinear in all three and different for each token."""
        a_C, b_C, c_C, d_C = self.factors_T4[rows].to(log_probs_C.dtype).unbind(1)
        return (
            a_C * (0.3 * log_probs_C).exp() + b_C * entropy_C.square() + c_C * divergence_C * log_probs_C + d_C * divergence_C
        )


@dataclass(frozen=True)
class Answer:
    """Loss, values [T] and gradients; on a rank, the gradients of its part of the hidden states and of its columns."""

    loss: Tensor
    log_probs_T: Tensor
    entropy_T: Tensor
    divergence_T: Tensor
    teacher_log_prob_T: Tensor
    teacher_entropy_T: Tensor
    d_hidden_SH: Tensor
    d_weight_VH: Tensor


def make_problem(num_tokens: int = 9, num_taught: int = 9, *, top_k: int = 5, scale: float = 1.0) -> Problem:
    """S = 16, H = 6, G = 5, V = 23 in float64. Loss rows are out of order and one occurs twice. All other rows of the hidden
    states are NaN: a row without a loss must not affect anything."""
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
    """The complete answer in float64 from whole logits."""
    p = problem.to(torch.float64)
    hidden_SH, weight_VH = p.hidden_SH.clone().requires_grad_(), p.weight_VH.clone().requires_grad_()
    log_p_TV = (hidden_SH[p.rows_T] @ weight_VH.T / p.temperature).log_softmax(1)
    log_prob_T = log_p_TV.gather(1, p.targets_T[:, None]).squeeze(1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(1)
    log_q_DV = (p.teacher_hidden_DG @ p.teacher_weight_VG.T / p.temperature).log_softmax(1)
    num_taught = 0 if kind in ("logits", "head") else len(log_q_DV)
    divergence_T = teacher_log_prob_T = teacher_entropy_T = torch.zeros_like(log_prob_T)
    if num_taught:
        taught_D = dense_divergence(p, kind, log_p_TV[:num_taught], log_q_DV, log_prob_T[:num_taught])
        divergence_T = torch.cat((taught_D, divergence_T[num_taught:]))
        told_D = log_q_DV.gather(1, p.targets_T[:num_taught, None]).squeeze(1)
        teacher_log_prob_T = torch.cat((told_D, teacher_log_prob_T[num_taught:]))
        if kind in WITH_ENTROPY:
            entropy_D = -(log_q_DV.exp() * log_q_DV).sum(1)
            teacher_entropy_T = torch.cat((entropy_D, teacher_entropy_T[num_taught:]))
    loss = p.loss(log_prob_T, entropy_T, divergence_T, slice(None)).sum()
    gradients = torch.autograd.grad(loss, (hidden_SH, weight_VH))
    values = log_prob_T, entropy_T, divergence_T, teacher_log_prob_T, teacher_entropy_T
    return Answer(loss.detach(), *(value_T.detach() for value_T in values), *gradients)


def dense_divergence(p: Problem, kind: str, log_p_DV: Tensor, log_q_DV: Tensor, log_prob_D: Tensor) -> Tensor:
    """The divergence [D] (for top_k_unbiased, its surrogate) from all log-probs of student and teacher."""
    if kind == "exact":
        return (log_p_DV.exp() * (log_p_DV - log_q_DV)).sum(1)
    if kind == "forward":
        return (log_q_DV.exp() * (log_q_DV - log_p_DV)).sum(1)
    if kind == CLIPPED:
        return (log_q_DV.exp() * (log_q_DV - log_p_DV)).clamp(max=0.2).sum(1)
    if kind in MIXED:
        beta = float(kind.split()[1])
        log_m_DV = torch.logaddexp(log_p_DV + math.log1p(-beta), log_q_DV + math.log(beta))
        teacher_D = (log_q_DV.exp() * (log_q_DV - log_m_DV)).sum(1)
        return beta * teacher_D + (1 - beta) * (log_p_DV.exp() * (log_p_DV - log_m_DV)).sum(1)
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
    if kind in JSD_TOP_K:
        return top_k_jsd(log_p_DV, log_q_DV, log_p_DK, log_q_DK, set_DK, with_rest=kind.endswith("bucket"))
    forward = kind in FORWARD_TOP_K
    weight_DK = log_q_DK.exp() if forward else log_p_DK.exp()
    inside_D = (weight_DK * ((log_q_DK - log_p_DK) if forward else (log_p_DK - log_q_DK))).sum(1)
    if kind.endswith("corrected"):
        inside_D = inside_D - log_p_DK.exp().sum(1) + log_q_DK.exp().sum(1)
    if not kind.endswith("bucket"):
        return inside_D
    outside_DV = torch.ones_like(log_p_DV).scatter(1, set_DK, 0.0)
    p_out_D, q_out_D = (log_p_DV.exp() * outside_DV).sum(1), (log_q_DV.exp() * outside_DV).sum(1)
    tiny = torch.finfo(torch.float64).tiny
    difference_D = p_out_D.clamp_min(tiny).log() - q_out_D.clamp_min(tiny).log()
    return inside_D - q_out_D * difference_D if forward else inside_D + p_out_D * difference_D


def top_k_jsd(
    log_p_DV: Tensor, log_q_DV: Tensor, log_p_DK: Tensor, log_q_DK: Tensor, set_DK: Tensor, *, with_rest: bool
) -> Tensor:
    """0.3 q log(q / m) + 0.7 p log(p / m), m = 0.3 q + 0.7 p, summed over the set and, on request, one class for the rest
    [D]."""
    if with_rest:
        outside_DV = torch.ones_like(log_p_DV).scatter(1, set_DK, 0.0)
        tiny = torch.finfo(torch.float64).tiny
        rest = ((each.exp() * outside_DV).sum(1, keepdim=True).clamp_min(tiny).log() for each in (log_p_DV, log_q_DV))
        log_p_DK, log_q_DK = (torch.cat(parts, dim=1) for parts in zip((log_p_DK, log_q_DK), rest, strict=True))
    log_m_DK = torch.logaddexp(log_q_DK + math.log(0.3), log_p_DK + math.log(0.7))
    terms_DK = 0.3 * log_q_DK.exp() * (log_q_DK - log_m_DK) + 0.7 * log_p_DK.exp() * (log_p_DK - log_m_DK)
    return terms_DK.sum(1)
