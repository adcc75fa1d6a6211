"""What a run checks in its first seconds, in its own layout: if one of these fails, every later number is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.errors import NumericalError
from kdrl_mcore.job import Job
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.model.scoring import run_forward, score_rollouts
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.types import Rollout
from kdrl_mcore.vocab_parallel import fused_exact_reverse_kl
from kdrl_mcore.vocab_parallel.collectives import gather_sequence

NUM_PROMPTS = 4
MAX_RESPONSE_TOKENS = 32
KL_BOUND = 1e-4
"""Of a model to itself, nats: the two logits are the same products in the same order, only their sums may be rounded."""
DRIFT_BOUNDS = {"float32": 1e-3, "bfloat16": 0.25}
"""Default of `rollout.max_log_prob_drift`, nats: decoding with a cache adds in another order than the trainer's forward pass,
and bfloat16 rounds logits of 32 to 0.125."""
NAMED_TOKENS = 3


def run_self_test(job: Job) -> None:
    """Check a few responses: the student's reverse KL to itself is zero, and sampler and trainer give their tokens the same
    log-probs. Collective over the world.

    Replayed rollouts come from another sampler: only the first check is made on them.

    Raises:
        NumericalError: naming the worst tokens.
    """
    if job.config.objective.kind == "sft":
        return
    if job.replay is not None:
        rollouts = job.replay.rollouts()[:NUM_PROMPTS]
    else:
        rollouts = _sample(job)
        check_sampler(job, rollouts)
    check_divergence(job, rollouts)


def check_sampler(job: Job, rollouts: Sequence[Rollout]) -> None:
    """The log-probs that the sampler reports are those that the trainer computes, to `rollout.max_log_prob_drift`."""
    bound = drift_bound(job.config)
    scored = score_rollouts(
        job.student.parts,
        rollouts,
        temperature=job.config.rollout.temperature,
        micro_tokens=job.config.batch.micro_tokens,
    )
    differences = [
        (abs(float(sampler) - float(trainer)), rollout, place, float(sampler), float(trainer))
        for rollout, (log_probs, _) in zip(rollouts, scored, strict=True)
        for place, (sampler, trainer) in enumerate(zip(rollout.sampler_log_probs, log_probs, strict=True))
    ]
    wrong = [each for each in differences if not each[0] <= bound]  # NaN is wrong too
    if wrong:
        worst = sorted(wrong, key=lambda each: -each[0])[:NAMED_TOKENS]
        named = "; ".join(
            f"prompt {rollout.prompt_id}, response token {place} (id {int(rollout.response_token_ids[place])}): sampler "
            f"{sampler:.5f}, trainer {trainer:.5f}"
            for _, rollout, place, sampler, trainer in worst
        )
        raise NumericalError(
            f"self-test: sampler and trainer differ by more than {bound:g} nats on {len(wrong)} of {len(differences)} tokens; "
            f"the worst: {named}; if this is rounding, raise rollout.max_log_prob_drift, else do not train"
        )


def check_divergence(job: Job, rollouts: Sequence[Rollout]) -> None:
    """The exact reverse KL of the student to itself, through the vocabulary-parallel pass of its own layout, is zero."""
    parts, temperature = job.student.parts, job.config.rollout.temperature

    def divergences(chunk: LanguageModel, batch: PackedBatch, hidden_SH: Tensor) -> list[float]:
        sequence_parallel = parts.config.sequence_parallel
        whole_SH = gather_sequence(hidden_SH, chunk.shard) if sequence_parallel else hidden_SH
        outputs = fused_exact_reverse_kl(
            hidden_SH,
            chunk.head_weight(),
            whole_SH[batch.rows_T],
            chunk.head_weight(),
            batch.rows_T,
            batch.targets_T,
            _no_loss,
            chunk.shard,
            temperature=temperature,
            sequence_parallel=sequence_parallel,
        )
        return [float(outputs.divergences.abs().amax())] if len(batch.rows_T) else []

    found = gather_from_replicas(parts.groups, run_forward(parts, rollouts, job.config.batch.micro_tokens, divergences))
    largest = max(found, default=0.0)
    if not largest <= KL_BOUND:
        raise NumericalError(
            f"self-test: the reverse KL of the student to itself is {largest:g} instead of 0: its logits are not finite, or "
            "the vocabulary-parallel sums are wrong in this layout"
        )


def drift_bound(config: Config) -> float:
    """The largest difference between a sampler's and the trainer's log-prob of one token that counts as rounding, nats."""
    given = config.rollout.max_log_prob_drift
    return DRIFT_BOUNDS[config.model.dtype] if given is None else given


def _sample(job: Job) -> list[Rollout]:
    assert job.engine is not None and job.prompts is not None
    settings = job.config.rollout
    sampling = Sampling(
        settings.temperature,
        1.0,  # with top_p the sampler's log-probs are those of the truncated distribution
        min(settings.max_response_tokens, MAX_RESPONSE_TOKENS),
        1,
        (job.config.trainer.seed, 2),
    )
    return job.engine.generate(job.prompts.first(NUM_PROMPTS), sampling)


def _no_loss(log_probs_C: Tensor, *_: object) -> Tensor:
    return torch.zeros_like(log_probs_C)
