"""From what a step measured to the numbers in `metrics.jsonl` (their names and meanings: `monitoring.metrics.METRICS`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.student import UpdateResult
from kdrl_mcore.types import Rollout


def step_metrics(
    rollouts: Sequence[Rollout], distil_N: Tensor, updates: Sequence[UpdateResult], alpha: float, beta: float, clock: Clock
) -> dict[str, float]:
    """The metrics of one KDRL step. Loss terms are means over its updates; token measures are means over its tokens."""
    lengths = np.array([len(rollout.response_token_ids) for rollout in rollouts], dtype=float)
    distilled = distil_N.numpy()
    metrics = {
        "reward": float(np.mean([rollout.reward for rollout in rollouts])),
        "accuracy": float(np.mean([rollout.correct for rollout in rollouts])),
        "response_length": float(lengths.mean()),
        "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "alpha": alpha,
        "beta": beta,
        "teacher_tokens": float(lengths[distilled].sum()),
        "teacher_tokens_saved": float(lengths[~distilled].sum()),
    }
    return {**metrics, **update_metrics(rollouts, updates, clock)}


def update_metrics(rollouts: Sequence[Rollout], updates: Sequence[UpdateResult], clock: Clock) -> dict[str, float]:
    """The part of the metrics that supervised steps have too."""
    sums: dict[str, float] = {}
    for update in updates:
        for name, value in update.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    tokens, distilled = sums.get("tokens", 0.0), sums.get("distilled_tokens", 0.0)
    metrics: dict[str, float] = {
        name: sums[name] / len(updates) for name in ("loss", "policy_loss", "kd_loss", "reference_loss") if name in sums
    }
    per_token = {"entropy": "entropy", "clipped_tokens": "clip_share", "drift": "drift_mean"}
    metrics.update({new: sums[name] / tokens for name, new in per_token.items() if name in sums and tokens})
    if distilled:
        metrics.update(
            {
                new: sums[name] / distilled
                for name, new in (("kl_k1", "kl"), ("kl_k2", "kl_k2"), ("kl_k3", "kl_k3"), ("kl_full", "kl_full"))
                if name in sums
            }
        )
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
