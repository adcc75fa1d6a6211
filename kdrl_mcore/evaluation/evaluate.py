"""Held-out evaluation with a rollout engine: avg@k of sampled responses, and greedy accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdrl_mcore.config import EvalConfig, RolloutConfig
from kdrl_mcore.rollout.engine import RolloutEngine, Sampling
from kdrl_mcore.types import Prompt, Rollout


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    verify: Callable[[Sequence[Rollout]], None],
    settings: EvalConfig,
    rollout: RolloutConfig,
    seed: int,
) -> dict[str, float]:
    """Accuracy on every prompt; the same draws at every call, so that two evaluations differ by the weights alone.

    Collective over the world. Returns `eval/accuracy` (mean over prompts and `settings.samples` responses each),
    `eval/accuracy_stderr` (its standard error over prompts), `eval/greedy_accuracy` where asked for, `eval/response_length`
    in tokens, and `eval/truncated`, the share that hit the limit.
    """
    metrics: dict[str, float] = {}
    modes = [("accuracy", settings.temperature, settings.samples)] + ([("greedy_accuracy", 0.0, 1)] if settings.greedy else [])
    for name, temperature, copies in modes:
        sampling = Sampling(
            temperature, rollout.top_p if temperature > 0 else 1.0, rollout.max_response_tokens, copies, (seed, 1)
        )
        rollouts = engine.generate(prompts, sampling)
        verify(rollouts)
        correct = np.array([r.correct for r in rollouts], dtype=float).reshape(len(prompts), copies)
        metrics[f"eval/{name}"] = float(correct.mean())
        if name == "accuracy":
            metrics["eval/accuracy_stderr"] = (
                float(correct.mean(axis=1).std(ddof=1) / len(prompts) ** 0.5) if len(prompts) > 1 else 0.0
            )
            metrics["eval/response_length"] = float(np.mean([len(r.response_token_ids) for r in rollouts]))
            metrics["eval/truncated"] = float(np.mean([r.finish_reason == "length" for r in rollouts]))
    return metrics
