"""Checks that a run makes in its first seconds, in its own layout: if one fails, every later number would be wrong."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config.derived import is_supervised
from kdrl_mcore.errors import NumericalError
from kdrl_mcore.job import Job
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.model.scoring import run_forward, score_rollouts
from kdrl_mcore.monitoring.drift import MEAN_DRIFT_BOUND, drift_bound, each_token_counts
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.types import Rollout
from kdrl_mcore.vocab_parallel import ExactReverseKL, HeadOutputs, HeadTokens, TeacherInputs, fused_head
from kdrl_mcore.vocab_parallel.collectives import gather_columns, gather_sequence
from kdrl_mcore.vocab_parallel.products import wide_product

logger = logging.getLogger(__name__)

NUM_PROMPTS = 4
MAX_RESPONSE_TOKENS = 32
KL_BOUND = 1e-4
"""Largest reverse KL of a model to itself, nats: both logits are the same products in the same order, and only their sums may
be rounded differently."""
HEAD_BOUND = 1e-3
"""Largest difference between two ways to sum the same logits in float32, nats."""
NAMED_TOKENS = 3
MAX_HEAD_ROWS = 32
"""The number of loss rows per micro-batch whose logits are gathered over the vocabulary."""


def run_self_test(job: Job) -> None:
    """Check on a few responses that sampler and trainer compute the same log-probs, and that the vocabulary-parallel head
    agrees with plain softmaxes. Collective over the world.

    Replayed rollouts come from another sampler, so only the second check is made on them.

    Raises:
        NumericalError: a check failed; the message names the worst tokens.
    """
    if is_supervised(job.config.objective):
        return
    start = time.perf_counter()
    settings = job.config.rollout
    sampling = Sampling(
        settings.temperature,
        1.0,  # with top_p the sampler's log-probs are those of the truncated distribution
        min(settings.max_response_tokens, MAX_RESPONSE_TOKENS),
        1,
        (job.config.trainer.seed, 2),
        experts=settings.replay_experts,
    )
    rollouts = job.source.first(NUM_PROMPTS, sampling)
    if job.source.samples:
        check_sampler(job, rollouts)
    check_head(job, rollouts)
    if dist.get_rank() == 0:
        logger.info("self-test passed in %.1f s", time.perf_counter() - start)


def check_sampler(job: Job, rollouts: Sequence[Rollout]) -> None:
    """Check that the sampler's log-probs agree with the trainer's: to `drift_bound` on each token, or in bfloat16 to
    `MEAN_DRIFT_BOUND` on average."""
    scored = score_rollouts(
        job.student.parts,
        rollouts,
        temperature=job.config.rollout.temperature,
        micro_tokens=job.config.batch.micro_tokens,
        replay_experts=job.student.parts.replay is not None,
    )
    differences = [
        (abs(float(sampler) - float(trainer)), rollout, token, float(sampler), float(trainer))
        for rollout, (log_probs, _) in zip(rollouts, scored, strict=True)
        for token, (sampler, trainer) in enumerate(zip(rollout.sampler_log_probs, log_probs, strict=True))
    ]
    if each_token_counts(job.config):
        bound = drift_bound(job.config)
        num_wrong = sum(not each[0] <= bound for each in differences)  # NaN is wrong too
        found = f"by more than {bound:g} nats on {num_wrong} of {len(differences)} tokens" if num_wrong else ""
    else:
        mean = sum(each[0] for each in differences) / max(1, len(differences))
        found = "" if mean <= MEAN_DRIFT_BOUND else f"by {mean:g} nats on average, more than {MEAN_DRIFT_BOUND:g}"
    if found:
        worst = sorted(differences, key=lambda each: -math.inf if math.isnan(each[0]) else -each[0])[:NAMED_TOKENS]
        named = "; ".join(
            f"prompt {rollout.prompt_id}, response token {token} (id {int(rollout.response_token_ids[token])}): sampler "
            f"{sampler:.5f}, trainer {trainer:.5f}"
            for _, rollout, token, sampler, trainer in worst
        )
        raise NumericalError(
            f"self-test: sampler and trainer differ {found}; the worst: {named}; if this is rounding, raise "
            "rollout.max_log_prob_drift; otherwise do not train"
        )


def check_head(job: Job, rollouts: Sequence[Rollout]) -> None:
    """Check the vocabulary-parallel pass over both heads, in this layout: the student's exact reverse KL to itself must be
    zero; its log-probs, and the reverse KL of each token's distribution to that of another token, must match gathered logits.

    The gathered logits are not rounded. The head rounds its own to the model's type, each by at most u |z|, u = 2^-8 for
    bfloat16. So a log-prob may differ by 2 u max|z|. A reverse KL D may differ, to first order, by
    (2 D + sqrt(2 D) + 2) u max|z|: the absolute values of its derivatives in the logits sum to
    E_p|log p/q - D| <= 2 D + sqrt(2 D) for one softmax and to 2 for the other. The bound holds for every single token,
    however large the model's logits are.
    """
    parts, temperature = job.student.parts, job.config.rollout.temperature

    def compare(chunk: LanguageModel, batch: PackedBatch, hidden_SH: Tensor) -> list[list[float]]:
        rows_T, targets_T = batch.rows_T[:MAX_HEAD_ROWS], batch.targets_T[:MAX_HEAD_ROWS]
        if not len(rows_T):
            return []
        sequence_parallel, weight_VH = parts.config.sequence_parallel, chunk.head_weight()
        hidden_TH = (gather_sequence(hidden_SH, chunk.shard) if sequence_parallel else hidden_SH)[rows_T]

        def reverse_kl(teacher_hidden_TH: Tensor) -> HeadOutputs:
            return fused_head(
                hidden_SH,
                weight_VH,
                rows_T,
                targets_T,
                _no_loss,
                chunk.shard,
                temperature=temperature,
                teacher=TeacherInputs(teacher_hidden_TH, weight_VH, ExactReverseKL()),
                sequence_parallel=sequence_parallel,
            )

        other = reverse_kl(hidden_TH.roll(1, 0))
        logits_TV = gather_columns(wide_product(hidden_TH, weight_VH.T), chunk.shard)[:, : chunk.shard.size] / temperature
        # A reverse KL combines the logits of two tokens.
        largest_T = logits_TV.abs().amax(1)
        rounding_T = torch.maximum(largest_T, largest_T.roll(1, 0)) * torch.finfo(weight_VH.dtype).eps / 2
        log_p_TV = logits_TV.log_softmax(1)
        expected_T = (log_p_TV.exp() * (log_p_TV - log_p_TV.roll(1, 0))).sum(1)
        log_probs_T = log_p_TV.gather(1, targets_T[:, None]).squeeze(1)
        slope_T = 2 * expected_T + (2 * expected_T.clamp(min=0.0)).sqrt() + 2
        # In units of the difference allowed for each token.
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
                "what rounding can do: the vocabulary-parallel sums are wrong in this layout; do not train"
            )


def _no_loss(tokens: HeadTokens, rows: slice) -> Tensor:
    return torch.zeros_like(tokens.log_probs)
