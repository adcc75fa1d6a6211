"""The axes of the objective beyond the paper, computed in the plain way: one response at a time, each formula as written.

T response tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
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


def before_end(row: dict[str, Any], settings: Any) -> int:
    """The number of a response's tokens without a final stop token that is left out of distillation."""
    masked = settings.stop_token == "mask" and row.get("finish_reason") == "stop"
    return len(row["response_token_ids"]) - masked


def compared_with(
    log_old_T: Tensor, log_teacher_T: Tensor | None, distilled: bool, row: dict[str, Any], settings: Any
) -> Tensor:
    """The denominator of the ratio: pi_old, or the geometric mixture pi_old^(1 - beta) T^beta."""
    if settings.combine != "ratio" or not distilled:
        return log_old_T
    assert log_teacher_T is not None
    taught = before_end(row, settings)
    mixture_T = (1 - settings.beta) * log_old_T + settings.beta * log_teacher_T
    return torch.cat([mixture_T[:taught], log_old_T[taught:]])


def policy_term(log_pi_T: Tensor, log_old_T: Tensor, a_T: Tensor, settings: Any) -> Tensor:
    """The policy loss of each token [T]."""
    rho_T = (log_pi_T - log_old_T).exp()
    if settings.ratio != "token":
        log_rho_T = (log_pi_T - log_old_T).detach()
        whole = (log_rho_T.mean() if settings.ratio == "sequence" else log_rho_T.sum()).exp()
        rho_T = whole * (log_pi_T - log_pi_T.detach()).exp()
    if settings.policy_loss == "cispo":
        return -torch.minimum(rho_T.detach(), torch.tensor(1 + settings.clip_high)) * a_T * log_pi_T
    value_T = torch.minimum(rho_T * a_T, rho_T.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a_T)
    if settings.dual_clip is not None:
        value_T = torch.where(a_T < 0, torch.maximum(value_T, settings.dual_clip * a_T), value_T)
    return -value_T


def other_advantages(rewards: Tensor, groups: Sequence[int], settings: Any) -> Tensor:
    """RLOO subtracts the mean of the others. REINFORCE++ subtracts the group's mean and divides by the batch's deviation."""
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
    ranked_together: list[Tensor] = []
    if settings.over == "batch":
        taught_rows = [i for i in range(len(rows)) if distilled[i]]
        row = {"response_token_ids": [0] * sum(len(d[i]) for i in taught_rows)}
        alone = replace(settings, over="response", normalize=False)
        joined = [torch.cat([each[i] for i in taught_rows]) for each in (d, entropies)]
        (whole,) = token_weights(joined[:1], joined[1:], torch.ones(1, dtype=torch.bool), [row], alone)
        ranked_together = list(whole.split([len(d[i]) for i in taught_rows]))
    for i, row in enumerate(rows):
        tokens = len(d[i])
        u = torch.ones_like(d[i])
        size, H = d[i].abs(), entropies[i]
        if settings.over == "batch":
            u = ranked_together.pop(0) if distilled[i] else u
        elif settings.token_weight == "entropy":
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
            at = [((t + 0.5) / tokens - settings.middle) / settings.width for t in range(tokens)]
            u = settings.low + (1 - settings.low) * torch.sigmoid(torch.tensor(at, dtype=d[i].dtype))
        elif settings.token_weight == "pass_rate":
            group = [other["correct"] for other in rows if other["group_id"] == row["group_id"]]
            p = sum(group) / len(group)
            u = torch.full_like(d[i], p**settings.solved * (1 - p) ** settings.unsolved)
        elif settings.token_weight == "trusted_prefix":
            u = torch.stack([1 + settings.rate * (1 - size[:t].sum() / size.sum()) for t in range(tokens)])
        elif settings.token_weight == "teacher_entropy":
            u = torch.exp(-settings.rate * H)
        taught = before_end(row, settings)
        u = torch.cat([u[:taught], torch.zeros_like(u[taught:])])
        weights.append(u if distilled[i] else torch.zeros_like(u))
    if settings.normalize:
        total = sum(float(u.sum()) for u in weights)
        tokens = sum(len(u) for i, u in enumerate(weights) if distilled[i])
        weights = [u * (tokens / total) for u in weights]
    return weights


def taught_at_most(tokens: int, settings: Any) -> int:
    """The number of a response's tokens up to the last one whose weight can be nonzero."""
    if settings.token_weight != "prefix":
        return tokens
    return min(tokens, settings.first_tokens or math.ceil(settings.share * tokens - 1e-9))


def other_divergence(log_p: Tensor, log_q: Tensor, settings: Any) -> Tensor:
    """Forward KL or Jensen-Shannon divergence of each token [T], over the vocabulary or a top-k set; log_p, log_q [T, V]."""
    p, q = log_p.exp(), log_q.exp()
    if settings.divergence == "jsd":
        return top_k_jsd(log_p, log_q, settings)
    if settings.estimator == "exact":
        entries = q * (log_q - log_p)
        return (entries if settings.entry_clip is None else entries.clamp(max=settings.entry_clip)).sum(1)
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


def top_k_jsd(log_p: Tensor, log_q: Tensor, settings: Any) -> Tensor:
    """b KL(T, m) + (1 - b) KL(pi, m) with m = b T + (1 - b) pi [T], over the vocabulary or over the form of a top-k set."""
    p, q, b = log_p.exp(), log_q.exp(), settings.jsd_beta
    if settings.estimator == "top_k":
        ranking = q if settings.top_k_support == "teacher" else p.detach()
        support = ranking.topk(min(settings.top_k, p.shape[1]), dim=1).indices
        rest = [1 - each.gather(1, support).sum(1, keepdim=True) for each in (p, q)]
        p, q = p.gather(1, support), q.gather(1, support)
        if settings.top_k_tail == "renormalize":
            p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        if settings.top_k_tail == "bucket":
            p, q = torch.cat([p, rest[0]], 1), torch.cat([q, rest[1]], 1)
    m = b * q + (1 - b) * p
    return b * (q * (q / m).log()).sum(1) + (1 - b) * (p * (p / m).log()).sum(1)


def shares(i: int, d_T: Tensor, teacher_entropy_T: Tensor, settings: Any) -> tuple[Tensor, Tensor]:
    """The shares [T] of the sampled reverse KL and of the divergence, as EOPD and TrOPD combine them; `i` is the response's
    index in the batch."""
    one_T = torch.ones_like(d_T)
    if settings.mix == "none":
        return (one_T, 0 * one_T) if settings.placement == "advantage" else (0 * one_T, one_T)
    if settings.mix == "entropy":
        return one_T, (teacher_entropy_T > settings.mix_above).to(d_T)
    trust_T = torch.minimum(d_T.exp(), one_T)
    if settings.mix == "drawn_trust":
        draws = np.random.default_rng([*settings.draw_seeds, i]).random(len(d_T), dtype=np.float32)
        trust_T = (torch.from_numpy(draws).to(d_T) < trust_T).to(d_T)
    return trust_T, 1 - trust_T
