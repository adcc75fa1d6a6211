"""One iteration of KDRL (arXiv 2506.02208), in the order of the paper.

The student samples its own answers; the verifier rewards them; the teacher scores the tokens that the mask keeps; one loss,
alpha * L_GRPO + beta * L_KD, gives one update. Every rank calls these functions with the same arguments and holds the same
rollouts; what is computed where is told in the function that does it. N responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdrl_mcore.experience import Experience
from kdrl_mcore.job import Job
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.objective.advantages import group_advantages, shaped_rewards
from kdrl_mcore.objective.aggregation import distillation_weights, response_weights
from kdrl_mcore.objective.masks import distillation_mask
from kdrl_mcore.step_metrics import step_metrics
from kdrl_mcore.teacher import TeacherScores
from kdrl_mcore.types import Rollout, TokenFloats


def run_iteration(job: Job, step: int, clock: Clock) -> tuple[list[Rollout], dict[str, float]]:
    """Refit, rollout, reward, mask, teacher, advantages, loss and update, schedules. Collective over the world."""
    alpha, beta = job.alpha.value, job.beta.value
    teacher = TeacherScores()

    def score_part(part: Mapping[int, Rollout]) -> None:  # whole verified groups, while others are being sampled
        job.score_with_teacher(teacher, part, mask_responses(job, list(part.values()), beta))

    with clock("refit"):
        job.refit()  # mu <- pi
    with clock("rollout"):
        rollouts = job.sample(step, score_part)  # o ~ mu( . | x), G responses to each prompt
        early_tokens = teacher.tokens
    with clock("reward"):
        job.verify(rollouts)  # r_i, and whether the answer is correct
    distil_N = mask_responses(job, rollouts, beta)  # which responses the teacher teaches
    with clock("teacher"):
        job.score_with_teacher(teacher, dict(enumerate(rollouts)), distil_N)  # T( . | s_t), only where the mask keeps it
    with clock("train"):
        updates = [
            job.update(prepare(job, batch, alpha, beta), alpha, beta) for batch in job.split(rollouts, teacher, distil_N)
        ]
    for update in updates:
        job.advance_schedules(update)  # alpha_t and beta_t move with the optimizer step
    metrics = step_metrics(rollouts, distil_N, updates, alpha, beta, clock)
    metrics.update(job.utilization(rollouts, metrics["time/train"]))
    return rollouts, {**metrics, "teacher_tokens_early": float(early_tokens)}


def mask_responses(job: Job, rollouts: Sequence[Rollout], beta: float) -> Tensor:
    """Which responses are distilled [N]: none while beta is zero, else by the reward-guided mask."""
    correct_N, group_ids_N = _column(rollouts, "correct").bool(), _column(rollouts, "group_id").long()
    if beta == 0:
        return torch.zeros(len(rollouts), dtype=torch.bool)
    return distillation_mask(correct_N, group_ids_N, job.config.objective.kd.mask)


def prepare(job: Job, batch: Experience, alpha: float, beta: float) -> Experience:
    """Fill in advantages and each token's share of the global loss."""
    objective, rollouts = job.config.objective, batch.rollouts
    rewards_N, group_ids_N = _column(rollouts, "reward").double(), _column(rollouts, "group_id").long()
    lengths_N = torch.tensor([len(rollout.response_token_ids) for rollout in rollouts])
    if objective.kd.placement == "reward" and beta > 0:
        rewards_N = shaped_rewards(rewards_N, _log_ratio_sums(batch), beta)
    advantages_N = (
        group_advantages(rewards_N, group_ids_N, normalize_by_std=objective.normalize_by_std)
        if alpha > 0
        else torch.zeros_like(rewards_N)
    )
    limit = job.config.rollout.max_response_tokens
    return batch.with_weights(
        advantages_N=advantages_N,
        policy_weights_N=response_weights(lengths_N, objective.aggregation, limit),
        distillation_weights_N=distillation_weights(
            lengths_N, batch.distil_N, objective.aggregation, limit, objective.kd.denominator
        ),
    )


def _log_ratio_sums(batch: Experience) -> Tensor:
    """sum_t (log T - log pi) of each response [N], pi being the policy that sampled; 0 where the teacher was not asked."""
    teacher: Sequence[TokenFloats | None] = batch.teacher_log_probs or [None] * len(batch.rollouts)
    return torch.tensor(
        [
            0.0 if scores is None else float((scores.astype("float64") - rollout.sampler_log_probs).sum())
            for rollout, scores in zip(batch.rollouts, teacher, strict=True)
        ],
        dtype=torch.float64,
    )


def _column(rollouts: Sequence[Rollout], name: str) -> Tensor:
    return torch.tensor([getattr(rollout, name) for rollout in rollouts])
