"""The work that runs while vLLM's servers sample: the next step's training, or the teacher."""

from __future__ import annotations

import numpy as np

from kdrl_mcore.planning.passes import Generation
from kdrl_mcore.planning.rates import HOST, Seconds
from kdrl_mcore.planning.setup import Setup


def hidden_seconds(setup: Setup, generation: Generation, teacher: Seconds, rest: float) -> float:
    """The seconds by which overlap makes an iteration shorter than the sum of its phases.

    Args:
        rest: seconds of all phases except generation and refit.
    """
    if not setup.engine_gpus:
        return 0.0
    rollout = setup.config.rollout
    if rollout.partial_tokens is not None:  # sampled part by part before the step trains
        return 0.0
    if rollout.steps_ahead:
        return min(generation.seconds.total, rest)
    if setup.teacher is None or not setup.config.teacher.score_while_sampling:
        return 0.0
    return _scored_early(setup, generation, teacher)


def _scored_early(setup: Setup, generation: Generation, teacher: Seconds) -> float:
    """The seconds saved when the teacher scores complete groups in parts: a micro-batch for each stage of each of its replicas.
    Its weights are loaded once for each part; what remains when the last response arrives is scored then."""
    assert setup.teacher is not None
    layouts = [teacher.layout for teacher in setup.teachers.values()]
    part = setup.config.batch.micro_tokens * max(layout.pipeline * layout.data for layout in layouts)
    sampled_tokens = setup.workload.tokens * setup.distilled
    given_tokens = setup.trained.tokens - setup.workload.tokens  # scored at the end
    parts = int(sampled_tokens // part)
    if not parts:
        return 0.0
    sampled = generation.seconds.total
    complete = _complete_groups(setup, generation)
    share = part / sampled_tokens
    loading = teacher[HOST] if any(setup.offloads(name) for name in setup.teachers) else 0.0
    scoring = (teacher.total - loading) * sampled_tokens / (sampled_tokens + given_tokens)
    now, done = 0.0, 0
    while done < parts:
        begins = max(now, float(np.quantile(complete, min(1.0, (done + 1) * share))))
        if begins >= sampled:
            break
        now, done = begins + loading + scoring * share, done + 1
    left = teacher.total - scoring * done * share if done * share < 1 or given_tokens else 0.0
    return sampled + teacher.total - (max(now, sampled) + left)


def _complete_groups(setup: Setup, generation: Generation) -> np.ndarray:
    """The seconds after which each group of responses is complete. Groups that do not run from the start begin evenly spread
    over the time in which others wait; a group is complete with its longest response."""
    workload, rollout = setup.workload, setup.config.rollout
    groups = np.arange(rollout.prompts_per_step)
    shortest, longest = float(workload.lengths_N.min()), workload.longest
    # The longest of G uniform draws between the shortest and the longest; the golden ratio makes neighbours differ.
    quantile = ((groups * 0.618034) % 1.0) ** (1 / rollout.responses_per_prompt)
    length = shortest + (longest - shortest) * quantile
    waited = np.maximum(0.0, groups / len(groups) - generation.at_once) / max(1e-9, 1 - generation.at_once)
    return np.minimum(
        generation.seconds.total,
        waited * generation.waiting.total + length / longest * generation.last.total,
    )
