"""What a run checks in its first seconds, in its own layout: if one of these fails, every later number is wrong."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.errors import NumericalError
from kdrl_mcore.job import Job
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.model.scoring import run_forward, score_rollouts
from kdrl_mcore.monitoring.alerts import DEFAULT_THRESHOLDS, AlertThresholds
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.types import Rollout
from kdrl_mcore.vocab_parallel import HeadOutputs, fused_exact_reverse_kl
from kdrl_mcore.vocab_parallel.collectives import gather_columns, gather_sequence
from kdrl_mcore.vocab_parallel.products import wide_product

logger = logging.getLogger(__name__)

NUM_PROMPTS = 4
MAX_RESPONSE_TOKENS = 32
KL_BOUND = 1e-4
"""Of a model to itself, nats: the two logits are the same products in the same order, only their sums may be rounded."""
HEAD_BOUND = 1e-3
"""Between two ways to add up the same logits in float32, nats."""
DRIFT_BOUNDS = {"float32": 1e-3, "bfloat16": 0.25}
"""Default of `rollout.max_log_prob_drift`, nats: decoding with a cache adds in another order than the trainer's forward pass,
and bfloat16 rounds logits of 32 to 0.125."""
MEAN_DRIFT_BOUND = DEFAULT_THRESHOLDS.drift_mean
"""In bfloat16 one token proves nothing: its difference is as large as the model's logits and the noise of its layers make it.
The mean does: rounding gave 0.006 to 0.010 nats (at most 0.03 on a token) in models of 4 to 12 layers and 64 to 512 wide, a
temperature of 1.2 for 1.0 gave 0.13 to 0.16, and one halved matrix of the last layer 0.06 to 0.12 (0.19 on a token)."""
NAMED_TOKENS = 3
MAX_HEAD_ROWS = 32
"""Loss rows of a micro-batch whose logits are gathered over the vocabulary."""


def run_self_test(job: Job) -> None:
    """Check a few responses: sampler and trainer give their tokens the same log-probs, and the vocabulary-parallel head gives
    what plain softmaxes give. Collective over the world.

    Replayed rollouts come from another sampler: only the second check is made on them.

    Raises:
        NumericalError: naming the worst tokens.
    """
    if job.config.objective.kind == "sft":
        return
    start = time.perf_counter()
    if job.replay is not None:
        rollouts = job.replay.rollouts()[:NUM_PROMPTS]
    else:
        rollouts = _sample(job)
        check_sampler(job, rollouts)
    check_head(job, rollouts)
    if dist.get_rank() == 0:
        logger.info("self-test passed in %.1f s", time.perf_counter() - start)


def check_sampler(job: Job, rollouts: Sequence[Rollout]) -> None:
    """The log-probs that the sampler reports are those that the trainer computes: on each token to `drift_bound`, or in
    bfloat16 on average to `MEAN_DRIFT_BOUND`."""
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
    if _each_token_counts(job.config):
        bound = drift_bound(job.config)
        num_wrong = sum(not each[0] <= bound for each in differences)  # NaN is wrong too
        found = f"by more than {bound:g} nats on {num_wrong} of {len(differences)} tokens" if num_wrong else ""
    else:
        mean = sum(each[0] for each in differences) / max(1, len(differences))
        found = "" if mean <= MEAN_DRIFT_BOUND else f"by {mean:g} nats on average, more than {MEAN_DRIFT_BOUND:g}"
    if found:
        worst = sorted(differences, key=lambda each: -math.inf if math.isnan(each[0]) else -each[0])[:NAMED_TOKENS]
        named = "; ".join(
            f"prompt {rollout.prompt_id}, response token {place} (id {int(rollout.response_token_ids[place])}): sampler "
            f"{sampler:.5f}, trainer {trainer:.5f}"
            for _, rollout, place, sampler, trainer in worst
        )
        raise NumericalError(
            f"self-test: sampler and trainer differ {found}; the worst: {named}; if this is rounding, raise "
            "rollout.max_log_prob_drift, else do not train"
        )


def check_head(job: Job, rollouts: Sequence[Rollout]) -> None:
    """The vocabulary-parallel pass over both heads, in this layout: the student's exact reverse KL to itself is zero; its
    log-probs, and the reverse KL of each token's distribution to that of another token, are those of gathered logits.

    The gathered logits are not rounded. The head rounds its own to the model's type, each by at most u |z|, u = 2^-8 for
    bfloat16. So a log-prob may differ by 2 u max|z|; and a reverse KL D, whose derivative in the logits adds up to
    E_p|log p/q - D| <= 2 D + sqrt(2 D) for one softmax and to 2 for the other, by (2 D + sqrt(2 D) + 2) u max|z| in first
    order. That bounds every single token, whatever the size of the model's logits.
    """
    parts, temperature = job.student.parts, job.config.rollout.temperature

    def compare(chunk: LanguageModel, batch: PackedBatch, hidden_SH: Tensor) -> list[list[float]]:
        rows_T, targets_T = batch.rows_T[:MAX_HEAD_ROWS], batch.targets_T[:MAX_HEAD_ROWS]
        if not len(rows_T):
            return []
        sequence_parallel, weight_VH = parts.config.sequence_parallel, chunk.head_weight()
        hidden_TH = (gather_sequence(hidden_SH, chunk.shard) if sequence_parallel else hidden_SH)[rows_T]

        def reverse_kl(teacher_hidden_TH: Tensor) -> HeadOutputs:
            return fused_exact_reverse_kl(
                hidden_SH,
                weight_VH,
                teacher_hidden_TH,
                weight_VH,
                rows_T,
                targets_T,
                _no_loss,
                chunk.shard,
                temperature=temperature,
                sequence_parallel=sequence_parallel,
            )

        other = reverse_kl(hidden_TH.roll(1, 0))
        logits_TV = gather_columns(wide_product(hidden_TH, weight_VH.T), chunk.shard)[:, : chunk.shard.size] / temperature
        # Two tokens' logits meet in a reverse KL.
        largest_T = logits_TV.abs().amax(1)
        rounding_T = torch.maximum(largest_T, largest_T.roll(1, 0)) * torch.finfo(weight_VH.dtype).eps / 2
        log_p_TV = logits_TV.log_softmax(1)
        expected_T = (log_p_TV.exp() * (log_p_TV - log_p_TV.roll(1, 0))).sum(1)
        log_probs_T = log_p_TV.gather(1, targets_T[:, None]).squeeze(1)
        slope_T = 2 * expected_T + (2 * expected_T.clamp(min=0.0)).sqrt() + 2
        # In units of what each token may differ by.
        log_prob_T = (other.log_probs - log_probs_T).abs() / (HEAD_BOUND + 2 * rounding_T)
        to_other_T = (other.divergences - expected_T).abs() / (HEAD_BOUND * expected_T.clamp(min=1.0) + slope_T * rounding_T)
        to_itself_T = reverse_kl(hidden_TH).divergences.abs()
        return [torch.stack((to_itself_T, log_prob_T, to_other_T)).amax(1).tolist()]

    found = gather_from_replicas(parts.groups, run_forward(parts, rollouts, job.config.batch.micro_tokens, compare))
    to_itself, log_prob, to_other = torch.tensor(found).reshape(-1, 3).amax(0).tolist() if found else (0.0, 0.0, 0.0)
    if not to_itself <= KL_BOUND:
        raise NumericalError(
            f"self-test: the reverse KL of the student to itself is {to_itself:g} instead of 0: its logits are not finite, or "
            "the vocabulary-parallel sums are wrong in this layout"
        )
    for what, times in (("log-probs", log_prob), ("reverse KL", to_other)):
        if not times <= 1.0:
            raise NumericalError(
                f"self-test: the {what} of the vocabulary-parallel head and of its gathered logits differ by {times:.3g} times "
                "what rounding can do: the vocabulary-parallel sums are wrong in this layout, do not train"
            )


def alert_thresholds(config: Config) -> AlertThresholds:
    """Of the run's alerts. Where the student samples for itself and makes one update per batch, sampler and trainer must agree
    to rounding at every step, so that more drift is a fault, not a property of another engine."""
    if config.rollout.engine == "megatron" and _is_on_policy(config):
        return AlertThresholds(drift_max=drift_bound(config))
    return DEFAULT_THRESHOLDS


def check_drift(config: Config, step: int, metrics: Mapping[str, float]) -> None:
    """The log-probs of a training step agree with the sampler's, where both have the same weights.

    As in the self-test the largest difference counts, or in bfloat16 the mean.

    Raises:
        NumericalError: on all ranks, as all have the same metrics.
    """
    if not _is_on_policy(config) or config.objective.kind == "sft":
        return
    name, bound = ("drift_max", drift_bound(config)) if _each_token_counts(config) else ("drift_mean", MEAN_DRIFT_BOUND)
    if metrics.get(name, 0.0) > bound:
        raise NumericalError(
            f"step {step}: the log-probs of sampler and trainer differ by {metrics['drift_mean']:.3g} nats on average and up "
            f"to {metrics['drift_max']:.3g} on one token ({name} may be {bound:g}): the sampler has other weights than the "
            "student, or another temperature; if this is rounding, raise rollout.max_log_prob_drift"
        )


def _each_token_counts(config: Config) -> bool:
    """Whether one token's difference can be a fault: in float32, or where the user says by how much tokens may differ."""
    return config.model.dtype == "float32" or config.rollout.max_log_prob_drift is not None


def _is_on_policy(config: Config) -> bool:
    """Whether every update is made with the weights that sampled its batch, and from their whole distribution."""
    settings = config.rollout
    sampled_now = settings.engine != "replay" and settings.steps_ahead == 0
    return sampled_now and settings.top_p == 1 and config.batch.updates_per_step == 1


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
    job.refit()
    rollouts = job.engine.generate(job.prompts.first(NUM_PROMPTS), sampling)
    job.engine.sleep()
    return rollouts


def _no_loss(log_probs_C: Tensor, *_: object) -> Tensor:
    return torch.zeros_like(log_probs_C)
