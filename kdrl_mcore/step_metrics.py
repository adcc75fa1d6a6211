"""The metrics of a step, as written to `metrics.jsonl` (`monitoring.metrics.METRICS` lists their names and meanings)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config import ClusterConfig
from kdrl_mcore.evaluation.metrics import standard_error
from kdrl_mcore.model.flop import peak_tflops, training_flop
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.model.lora import adapters
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.objective.correction import effective_share
from kdrl_mcore.student.student import UpdateResult
from kdrl_mcore.teacher.leak import leak_metrics
from kdrl_mcore.types import Rollout

MEASURES: dict[str, Callable[[Sequence[Rollout]], float]] = {
    "reward": lambda rollouts: float(np.mean([rollout.reward for rollout in rollouts])),
    "accuracy": lambda rollouts: float(np.mean([rollout.correct for rollout in rollouts])),
    "response_length": lambda rollouts: float(np.mean([float(len(rollout.response_token_ids)) for rollout in rollouts])),
    "truncated": lambda rollouts: float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
}
"""Measures over all sampled responses of a step, and over those of each domain."""


def step_metrics(
    rollouts: Sequence[Rollout], scored_N: Tensor, updates: Sequence[UpdateResult], alpha: float, beta: float, clock: Clock
) -> dict[str, float]:
    """The metrics of one KDRL step. Loss terms are averaged over its updates, token measures over its tokens.

    Args:
        scored_N: how many tokens of each response the teacher scored.
    """
    lengths = np.array([len(rollout.response_token_ids) for rollout in rollouts], dtype=float)
    tokens, scored = int(lengths.sum()), int(scored_N.sum())
    given = np.array([rollout.given for rollout in rollouts])
    sampled = [rollout for rollout in rollouts if not rollout.given]
    metrics = {
        **{name: measure(sampled) for name, measure in MEASURES.items()},
        **_over_prompts("reward", [rollout.reward for rollout in sampled], sampled),
        **_over_prompts("accuracy", [rollout.correct for rollout in sampled], sampled),
        "truncated_correct": float(np.mean([rollout.correct and rollout.finish_reason == "length" for rollout in sampled])),
        "verifier_timeouts": float(sum(rollout.extra.get("verifier_timeout", 0.0) for rollout in sampled)),
        "verifier_crashes": float(sum(rollout.extra.get("verifier_crash", 0.0) for rollout in sampled)),
        "alpha": alpha,
        "beta": beta,
        "teacher_tokens": float(scored),
        "teacher_tokens_saved": float(tokens - scored),
    }
    if beta:
        metrics["distilled_responses"] = float((scored_N > 0).double().mean())
    if given.any():
        metrics |= {"given_responses": float(given.sum()), "given_tokens": float(lengths[given].sum())}
    metrics |= leak_metrics(sampled)
    return {**metrics, **domain_metrics(sampled, tuple(MEASURES)), **update_metrics(rollouts, updates, clock)}


def teacher_metrics(
    taught_by_N: Tensor, scored_N: Tensor, updates: Sequence[UpdateResult], shares: Mapping[str, float], beta: float
) -> dict[str, float]:
    """The metrics of each of several teachers, `teacher/NAME/...`: its present beta, the responses and tokens that it scored,
    and the KL on the sampled ones of its tokens; and the number of responses that none teaches.

    Args:
        taught_by_N, scored_N: which teachers teach each response, as a sum of 2^k, and how many of its tokens are scored.
        shares: of beta, by teacher.
    """
    metrics = {"untaught_responses": float((taught_by_N == 0).sum())}
    for number, (name, share) in enumerate(shares.items()):
        own_N = torch.where((taught_by_N >> number) & 1 != 0, scored_N, 0)
        of_teacher = f"teacher/{name}"
        metrics |= {
            f"{of_teacher}/beta": beta * share,
            f"{of_teacher}/responses": float((own_N > 0).sum()),
            f"{of_teacher}/tokens": float(own_N.sum()),
        }
        tokens = sum(update.sums.get(f"{of_teacher}/tokens", 0.0) for update in updates)
        for measure, new in (("kl_k1", "kl"), ("kl_full", "kl_full")):
            values = [update.sums[key] for update in updates if (key := f"{of_teacher}/{measure}") in update.sums]
            if values and tokens:
                metrics[f"{of_teacher}/{new}"] = sum(values) / tokens
    return metrics


def domain_metrics(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float]:
    """The named `MEASURES` of each domain's responses, and their number; empty without domains."""
    domains: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.domain:
            domains.setdefault(rollout.domain, []).append(rollout)
    metrics: dict[str, float] = {}
    for domain, own in sorted(domains.items()):
        metrics |= {f"domain/{domain}/{name}": MEASURES[name](own) for name in names}
        metrics[f"domain/{domain}/samples"] = float(len(own))
    return metrics


def _over_prompts(name: str, values_N: Sequence[float], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean over responses and, given several prompts, its standard error clustered by prompt."""
    groups: dict[int, list[float]] = {}
    for value, rollout in zip(values_N, rollouts, strict=True):
        groups.setdefault(rollout.group_id, []).append(float(value))
    measured = {name: float(np.mean(values_N))}
    if len(groups) > 1:
        measured[f"{name}_stderr"] = standard_error([np.array([np.mean(each) for each in groups.values()])])
    return measured


def update_metrics(rollouts: Sequence[Rollout], updates: Sequence[UpdateResult], clock: Clock) -> dict[str, float]:
    """The metrics that KDRL steps and supervised steps share."""
    sums: dict[str, float] = {}
    for update in updates:
        for name, value in update.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    tokens, distilled, given = (sums.get(name, 0.0) for name in ("tokens", "distilled_tokens", "given_tokens"))
    # Given responses were not sampled: they have no drift, and do not count for clipping, entropy and KL.
    own, own_distilled = tokens - given, max(0.0, distilled - given)
    metrics: dict[str, float] = {
        name: sums[name] / len(updates) for name in ("loss", "policy_loss", "kd_loss", "reference_loss") if name in sums
    }
    means = {
        "entropy": ("entropy", own),
        "clipped_tokens": ("clip_share", own),
        "outside_tokens": ("outside_share", own),
        "drift": ("drift_mean", own),
        "taught_tokens": ("taught_share", tokens),
        "gated_tokens": ("gated_share", own),
        "mixed_tokens": ("mixed_share", distilled),
        "kd_cut_tokens": ("kd_cut_share", distilled),
        "corrected_tokens": ("corrected_share", own),
        "kl_k1": ("kl", own_distilled),
        "kl_k2": ("kl_k2", own_distilled),
        "kl_k3": ("kl_k3", own_distilled),
        "kl_full": ("kl_full", distilled),
    }
    metrics.update({new: sums[name] / counted for name, (new, counted) in means.items() if name in sums and counted})
    for weights, counted, others in (
        ("correction", own, given),
        ("kd_importance", distilled, 0.0),
        ("ratio", own, given),
    ):  # others have weight 1
        if weights in sums:
            total, squares = sums[weights] - others, sums[f"{weights}_squared"] - others
            metrics["rollout_ess" if weights == "ratio" else f"{weights}_ess"] = effective_share(total, squares, counted)
    for name in {name for update in updates for name in update.maxima}:
        metrics[name] = max(update.maxima.get(name, 0.0) for update in updates)
    metrics["grad_norm"] = float(np.mean([update.grad_norm for update in updates]))
    metrics["lr"] = updates[-1].lr
    for update in updates:
        metrics.update(update.gradient_split)
    metrics["skipped_updates"] = float(sum(update.skipped is not None for update in updates))
    metrics["tokens"] = float(sum(rollout.num_tokens for rollout in rollouts))
    metrics["samples"] = float(len(rollouts))
    metrics.update({f"time/{phase}": seconds for phase, seconds in clock.seconds.items()})
    metrics["time/step"] = clock.total
    metrics.update({f"memory/{phase}": gib for phase, gib in clock.peak_gib.items()})
    metrics["time/head"] = sum(update.head_seconds for update in updates)
    metrics["time/head_share"] = metrics["time/head"] / metrics["time/train"]
    return metrics


def utilization(student: ModelParts, rollouts: Sequence[Rollout], seconds: float, cluster: ClusterConfig) -> dict[str, float]:
    """TFLOP/s per rank during the step's updates and, if the GPU's peak is known, as a share of it. A prompt whose rows
    responses share counts once.

    Args:
        seconds: the duration of the updates.
    """
    shapes = [(len(rollout.prompt_token_ids), len(rollout.response_token_ids)) for rollout in rollouts]
    if student.share_prompts:
        prompts = {rollout.prompt_token_ids.tobytes(): prompt for rollout, (prompt, _) in zip(rollouts, shapes, strict=True)}
        sequences = [(prompt, 0, 0) for prompt in prompts.values()]
        sequences += [(response, response, prompt) for prompt, response in shapes]
    else:
        sequences = [(prompt + response, response, 0) for prompt, response in shapes]
    flop = training_flop(student.architecture, sequences, frozen=any(True for _ in adapters(student.chunks)))
    tflops = flop / seconds / dist.get_world_size() / 1e12
    peak = peak_tflops(cluster)
    return {"time/tflops": tflops, "time/mfu": tflops / peak} if peak else {"time/tflops": tflops}
