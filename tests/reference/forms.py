"""The axes of the objective beyond the paper's, the plain way: one response at a time, each formula as it is written.

T response tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def combine(advantage: Tensor, d_T: Tensor, distilled: bool, row: dict[str, Any], settings: Any) -> tuple[Tensor, Tensor]:
    """(coefficient of the policy loss, weight of distillation), each [T]."""
    a, b = [], []
    for d in d_T.tolist():
        s = (1.0 if row["correct"] else -1.0) if settings.signal == "correct" else float(torch.sign(advantage))
        A, g = float(advantage), 1.0
        if settings.combine == "gate":
            z = 1.0 if distilled and (not row["correct"] or row.get("given")) else 0.0
            A, g = (1 - z) * A, z
        elif settings.combine == "sign":
            g = settings.agree if math.copysign(1, d) * (d != 0) == s else settings.differ
        elif settings.combine == "relu":
            A, g = 0.0, 1.0 if s * d > 0 else 0.0
        elif settings.combine == "modulate":
            m = math.exp(math.copysign(1, A) * (A != 0) * d)
            m = min(m, 1 + settings.modulate_clip)
            if settings.bounds == "both":
                m = max(m, 1 - settings.modulate_clip)
            A, g = ((1 - settings.beta) + settings.beta * m) * A, 0.0
        elif settings.combine == "ratio":
            g = 0.0
        elif settings.combine == "reference":
            g = settings.extrapolation
        elif settings.combine != "add":
            raise ValueError(f"combine {settings.combine}")
        a.append(A)
        b.append(g)
    return torch.tensor(a, dtype=d_T.dtype), torch.tensor(b, dtype=d_T.dtype)


def compared_with(log_old_T: Tensor, log_teacher_T: Tensor | None, distilled: bool, settings: Any) -> Tensor:
    """What the ratio divides pi by: pi_old, or the geometric mixture pi_old^(1 - beta) T^beta."""
    if settings.combine != "ratio" or not distilled:
        return log_old_T
    assert log_teacher_T is not None
    return (1 - settings.beta) * log_old_T + settings.beta * log_teacher_T


def policy_term(log_pi_T: Tensor, log_old_T: Tensor, a_T: Tensor, settings: Any) -> Tensor:
    """The policy loss of each token [T]."""
    rho_T = (log_pi_T - log_old_T).exp()
    if settings.ratio == "sequence":
        whole = (log_pi_T - log_old_T).detach().mean().exp()
        rho_T = whole * (log_pi_T - log_pi_T.detach()).exp()
    if settings.policy_loss == "cispo":
        return -torch.minimum(rho_T.detach(), torch.tensor(1 + settings.clip_high)) * a_T * log_pi_T
    value_T = torch.minimum(rho_T * a_T, rho_T.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a_T)
    if settings.dual_clip is not None:
        value_T = torch.where(a_T < 0, torch.maximum(value_T, settings.dual_clip * a_T), value_T)
    return -value_T


def other_advantages(rewards: Tensor, groups: Sequence[int], settings: Any) -> Tensor:
    """RLOO: minus the mean of the others. REINFORCE++: minus the group's mean, over the deviation of these in the batch."""
    result = torch.zeros_like(rewards)
    for i, group in enumerate(groups):
        same = [j for j, other in enumerate(groups) if other == group]
        if len({float(rewards[j]) for j in same}) == 1:
            continue
        if settings.baseline == "leave_one_out":
            result[i] = rewards[i] - torch.stack([rewards[j] for j in same if j != i]).mean()
        else:
            result[i] = rewards[i] - torch.stack([rewards[j] for j in same]).mean()
    if settings.baseline == "batch":
        result = result / ((result.square().sum() / (len(result) - 1)).sqrt() + 1e-6)
    return result


def token_weights(
    d: Sequence[Tensor], entropies: Sequence[Tensor], distilled: Tensor, rows: Sequence[dict[str, Any]], settings: Any
) -> list[Tensor]:
    """The weight of each token's distillation [T], per response."""
    weights = []
    for i, row in enumerate(rows):
        tokens = len(d[i])
        u = torch.ones_like(d[i])
        size, H = d[i].abs(), entropies[i]
        if settings.token_weight == "entropy":
            ranked = sorted(range(tokens), key=lambda t: (-float(H[t]), t))
            first = math.ceil(settings.share * tokens - 1e-9)
            left = sorted(ranked[first:], key=lambda t: (-float(size[t]), t))
            chosen = {*ranked[:first], *left[: math.ceil(settings.more * len(left) - 1e-9)]}
            u = torch.tensor([float(t in chosen) for t in range(tokens)], dtype=d[i].dtype)
        elif settings.token_weight == "magnitude":
            ranked = sorted(range(tokens), key=lambda t: (-float(size[t]), t))[: math.ceil(settings.share * tokens - 1e-9)]
            u = torch.zeros_like(d[i])
            for t in ranked:
                u[t] = torch.tanh(d[i][t]) / d[i][t] if d[i][t] else 1.0
        elif settings.token_weight == "prefix":
            first = settings.first_tokens or math.ceil(settings.share * tokens - 1e-9)
            u = torch.tensor([float(t < first) for t in range(tokens)], dtype=d[i].dtype)
        elif settings.token_weight == "rising":
            u = torch.tensor([((t + 1) / tokens) ** settings.rate for t in range(tokens)], dtype=d[i].dtype)
        elif settings.token_weight == "pass_rate":
            group = [other["correct"] for other in rows if other["group_id"] == row["group_id"]]
            p = sum(group) / len(group)
            u = torch.full_like(d[i], p**settings.solved * (1 - p) ** settings.unsolved)
        elif settings.token_weight == "trusted_prefix":
            u = torch.stack(
                [torch.exp(-settings.rate * size[:t].mean()) if t else torch.ones(()).to(size) for t in range(tokens)]
            )
        elif settings.token_weight == "teacher_entropy":
            u = torch.exp(-settings.rate * H)
        if settings.stop_token == "mask" and row.get("finish_reason") == "stop":
            u = torch.cat([u[:-1], torch.zeros_like(u[-1:])])
        weights.append(u if distilled[i] else torch.zeros_like(u))
    if settings.normalize:
        total = sum(float(u.sum()) for u in weights)
        tokens = sum(len(u) for i, u in enumerate(weights) if distilled[i])
        weights = [u * (tokens / total) for u in weights]
    return weights


def other_divergence(log_p: Tensor, log_q: Tensor, settings: Any) -> Tensor:
    """Forward KL or Jensen-Shannon divergence of each token [T], over the vocabulary or a top-k set; log_p, log_q [T, V]."""
    p, q = log_p.exp(), log_q.exp()
    if settings.divergence == "jsd":
        b = settings.jsd_beta
        log_m = (b * q + (1 - b) * p).log()
        return b * (q * (log_q - log_m)).sum(1) + (1 - b) * (p * (log_p - log_m)).sum(1)
    if settings.estimator == "exact":
        return (q * (log_q - log_p)).sum(1)
    ranking = log_q if settings.top_k_support == "teacher" else log_p.detach()
    support = ranking.topk(min(settings.top_k, log_p.shape[1]), dim=1).indices
    log_p_S, log_q_S = log_p.gather(1, support), log_q.gather(1, support)
    if settings.top_k_tail == "renormalize":
        log_p_S, log_q_S = log_p_S.log_softmax(1), log_q_S.log_softmax(1)
    inside = (log_q_S.exp() * (log_q_S - log_p_S)).sum(1)
    if settings.top_k_tail != "bucket" or support.shape[1] == log_p.shape[1]:
        return inside
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, support, False)
    rest_p, rest_q = (p * outside).sum(1), (q * outside).sum(1)
    return inside + rest_q * (rest_q.log() - rest_p.log())


def mixed(sampled_T: Tensor, divergence_T: Tensor, d_T: Tensor, teacher_entropy_T: Tensor, settings: Any) -> Tensor:
    """The sampled reverse KL and the divergence, as EOPD and TrOPD join them [T]."""
    if settings.mix == "entropy":
        return sampled_T + (teacher_entropy_T > settings.mix_above) * divergence_T
    if settings.mix == "trust":
        trust_T = torch.minimum(d_T.exp(), torch.ones_like(d_T))
        return trust_T * sampled_T + (1 - trust_T) * divergence_T
    return divergence_T
