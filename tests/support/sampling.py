"""Prompts for the embedded engine, and the responses it samples for them on the ranks of a pool."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [33, 1], [40, 41, 42, 43, 44], [2, 3], [60]]  # token ids
LIMIT = 20  # tokens of a response
RESPONSES = 3  # responses per prompt
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "top_p": 1.0},
    "cool": {"temperature": 0.6, "top_p": 1.0},
    "nucleus": {"temperature": 0.8, "top_p": 0.7},
    "greedy": {"temperature": 0.0, "top_p": 1.0},
    "head": {"temperature": 1.2, "top_p": 0.9, "top_k": 12, "min_p": 0.02},
}


def generate_on_rank(
    overrides: list[str], prompts: list[list[int]], samplings: dict[str, dict[str, Any]], parts: tuple[int, int] | None = None
) -> dict[str, Any]:
    """For each call of the sampler: the responses, and the log-probs that the trainer computes for them.

    Args:
        parts: the number of tokens to sample at a time, and the largest number of continuations.
    """
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.build import build_job
    from kdrl_mcore.model.scoring import score_rollouts
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.types import Prompt
    from kdrl_mcore.vocab_parallel import Support

    job = build_job(load_config(overrides))
    assert job.engine is not None
    asked = [Prompt(f"p{i}", "", np.array(ids, dtype=np.int64), "") for i, ids in enumerate(prompts)]
    result = {}
    for name, how in samplings.items():
        limits = {"max_response_tokens": LIMIT, "responses_per_prompt": RESPONSES}
        sampling = Sampling(key=(1, 0, 7), **limits | how)
        rollouts = job.engine.generate(asked, sampling) if parts is None else in_parts(job.engine, asked, sampling, *parts)
        settings = {"temperature": how["temperature"] or 1.0, "micro_tokens": 100}
        support = Support(sampling.top_p, sampling.top_k, sampling.min_p)
        scored = score_rollouts(job.student.parts, rollouts, support=support, **settings)
        result[name] = [
            {
                "prompt_id": rollout.prompt_id,
                "group_id": rollout.group_id,
                "prompt_token_ids": rollout.prompt_token_ids.tolist(),
                "response_token_ids": rollout.response_token_ids.tolist(),
                "sampler_log_probs": rollout.sampler_log_probs,
                "finish_reason": rollout.finish_reason,
                "continuations": rollout.continuations,
                "trainer_log_probs": log_probs,
            }
            for rollout, (log_probs, _) in zip(rollouts, scored, strict=True)
        ]
    return result


def in_parts(engine: Any, prompts: list[Any], sampling: Any, tokens: int, continuations: int) -> list[Any]:
    """Sample in parts; every other prompt is begun one part later."""
    from kdrl_mcore.rollout.ledger import Draw, Entry
    from kdrl_mcore.rollout.partial import PartialSampling

    entries = [Entry(("", i), prompt, Draw(7, 0, i)) for i, prompt in enumerate(prompts)]
    parts, begun = PartialSampling(tokens, continuations), entries[::2]
    while any(entry.rollouts is None for entry in entries):
        parts.sample(engine, begun, replace(sampling, key=sampling.key[:-1]))
        begun = entries
    return [replace(rollout, group_id=i) for i, entry in enumerate(entries) for rollout in entry.rollouts or ()]


def generate_with_packed_weights(
    overrides: list[str], prompts: list[list[int]], samplings: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], int, int]:
    """`generate_on_rank` as if every weight were large: what it samples, how many weights were copied in each generation, and
    how many copies are left."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.model import gpt, linear
    from kdrl_mcore.rollout import megatron

    alive: list[weakref.ref[torch.Tensor]] = []
    pack_really = linear.pack

    def pack(weight: torch.Tensor) -> torch.Tensor | None:
        packed = pack_really(weight)
        assert packed is not None and packed.is_mkldnn
        alive.append(weakref.ref(packed))
        return packed

    with (
        mock.patch.object(linear, "_LEAST_ELEMENTS", 0),
        mock.patch.object(megatron, "_WORTH_PACKING", 0),
        mock.patch.object(linear, "pack", pack),
        mock.patch.object(gpt, "pack", pack),
    ):
        result = generate_on_rank(overrides, prompts, samplings)
    return result, len(alive) // len(samplings), sum(packed() is not None for packed in alive)


def tokens_of(result: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[int]]]:
    return {name: [row["response_token_ids"] for row in rows] for name, rows in result.items()}


def assert_close(found: Sequence[float], expected: Sequence[float] | torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-5)


def drift_of_experts(overrides: list[str], prompts: list[list[int]], parts: tuple[int, int] | None = None) -> dict[str, Any]:
    """The responses with the experts that were recorded while they were sampled, and their mean drift if the trainer replays
    these experts, or chooses them itself.

    Args:
        parts: see `generate_on_rank`.
    """
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.build import build_job
    from kdrl_mcore.model.scoring import score_rollouts
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.types import Prompt

    job = build_job(load_config(overrides))
    assert job.engine is not None
    asked = [Prompt(f"p{i}", "", np.array(ids, dtype=np.int64), "") for i, ids in enumerate(prompts)]
    sampling = Sampling(1.0, 1.0, LIMIT, RESPONSES, key=(1, 0, 7), experts=True)
    rollouts = job.engine.generate(asked, sampling) if parts is None else in_parts(job.engine, asked, sampling, *parts)
    found: dict[str, Any] = {"tokens": [rollout.response_token_ids.tolist() for rollout in rollouts]}
    found["experts"] = [rollout.experts for rollout in rollouts]
    for name, replays in (("own", False), ("replayed", True)):
        scored = score_rollouts(job.student.parts, rollouts, temperature=1.0, micro_tokens=100, replay_experts=replays)
        differences = [log_probs - each.sampler_log_probs for each, (log_probs, _) in zip(rollouts, scored, strict=True)]
        found[name] = float(np.abs(np.concatenate(differences)).mean())
    return found
