"""One iteration of KDRL (arXiv 2506.02208), in the order of the paper.

The student samples responses, the verifier rewards them, the teacher scores those that the mask keeps, and the student is
updated on one joint loss, alpha * L_GRPO + beta * L_KD. Every rank calls these functions with the same arguments and holds the
same rollouts; the functions called here document which rank does what.

Notation: prompt x, response o, state s_t = (x, o_<t); sampling policy mu, student pi, teacher T; N responses, G per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdrl_mcore.config import ObjectiveConfig
from kdrl_mcore.config.derived import TEACH_INCORRECT, teaches_by_advantage
from kdrl_mcore.job import Job
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.objective.advantages import group_advantages, have_equal_rewards, shaped_rewards
from kdrl_mcore.objective.aggregation import distillation_weights, response_weights
from kdrl_mcore.objective.masks import distillation_mask
from kdrl_mcore.step_metrics import step_metrics, teacher_metrics, utilization
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.student.update import advance_schedules, update
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.types import Rollout, TokenFloats


def run_iteration(job: Job, step: int, clock: Clock) -> tuple[list[Rollout], dict[str, float]]:
    """Run one iteration and return its rollouts and metrics. Collective over the world."""
    objective, limit = job.config.objective, job.config.rollout.max_response_tokens
    alpha, beta = job.alpha.value, job.beta.value
    teacher = TeacherScores()

    def score_part(part: Mapping[int, Rollout]) -> None:  # verified groups, while others are sampled
        responses = list(part.values())
        job.score_with_teacher(teacher, part, mask_responses(objective, responses, beta) & job.has_teacher(responses))

    with clock("refit"):
        job.source.refit()  # mu <- pi
    with clock("rollout"):
        rollouts = job.source.rollouts(step, score_part)  # o ~ mu( . | x), G responses per prompt
        if job.source.chosen is not None:
            teacher.keep(job.source.chosen)  # scores of groups that were dropped are dropped with them
        early_tokens = teacher.tokens
    with clock("reward"):
        job.source.verify(rollouts)  # r_i, and whether the response is correct
    distil_N = mask_responses(objective, rollouts, beta) & job.has_teacher(rollouts)  # the responses that L_KD covers
    with clock("teacher"):
        job.score_with_teacher(teacher, dict(enumerate(rollouts)), distil_N)  # T( . | s_t) for these responses only
    updates = []
    with clock("train"):
        for batch in job.split(rollouts, teacher, distil_N):  # one batch per optimizer step
            batch = job.score_before_update(batch)  # log pi, where a setting needs whole responses
            advantages_N = compute_advantages(objective, batch, alpha, beta, job.mask_stop_token)  # A_i, relative to its group
            weighted = weigh_responses(objective, batch, advantages_N, limit)  # each response's weight in L_GRPO and L_KD
            weighted = job.weigh_tokens(weighted)  # and that of its tokens, and sequence ratios
            updates.append(update(job.student, weighted, job.config, alpha, beta))  # alpha * L_GRPO + beta * L_KD
    scored_N, shares = job.scored_tokens(rollouts, distil_N), {name: share.value for name, share in job.shares.items()}
    metrics = step_metrics(rollouts, scored_N, updates, alpha, beta, clock)
    if job.pool is not None:
        metrics |= teacher_metrics(job.pool.taught_by(rollouts), scored_N, updates, shares, beta)
    for result in updates:
        advance_schedules(result, job.alpha, job.beta, job.shares)  # alpha_t and beta_t follow the optimizer steps
    metrics |= utilization(job.student.parts, rollouts, metrics["time/train"], job.config.cluster)
    if job.source.chosen is not None:
        metrics["teacher_tokens_dropped"] = float(teacher.dropped_tokens)
    return rollouts, {**metrics, **job.source.counts, "teacher_tokens_early": float(early_tokens)}


def mask_responses(objective: ObjectiveConfig, rollouts: Sequence[Rollout], beta: float) -> Tensor:
    """Which responses are distilled [N]: given ones and those that the reward-guided mask keeps; none while beta is zero."""
    correct_N, group_ids_N = _column(rollouts, "correct").bool(), _column(rollouts, "group_id").long()
    if beta == 0:
        return torch.zeros(len(rollouts), dtype=torch.bool)
    distil_N = distillation_mask(correct_N, group_ids_N, objective.kd.mask)
    if teaches_by_advantage(objective):
        distil_N = distil_N & ~have_equal_rewards(_column(rollouts, "reward").double(), group_ids_N)
    distil_N = distil_N & ~correct_N if objective.combine.kind in TEACH_INCORRECT else distil_N
    return distil_N | _column(rollouts, "given").bool()


def compute_advantages(
    objective: ObjectiveConfig, batch: TrainingBatch, alpha: float, beta: float, mask_stop_token: bool = False
) -> Tensor:
    """The group-relative advantage A_i of each response [N]; zero while alpha is zero, and for responses that were given. With
    `objective.kd.placement=reward` the reward is r_i + beta * sum_t (log T - log pi); the sum leaves out a masked stop
    token."""
    rewards_N, group_ids_N = _column(batch.rollouts, "reward").double(), _column(batch.rollouts, "group_id").long()
    if alpha == 0:
        return torch.zeros_like(rewards_N)
    if objective.kd.placement == "reward" and beta > 0:
        rewards_N = shaped_rewards(rewards_N, _log_ratio_sums(batch, mask_stop_token), beta)
    advantages_N, sampled_N = torch.zeros_like(rewards_N), ~batch.given_N
    advantages_N[sampled_N] = group_advantages(
        rewards_N[sampled_N],
        group_ids_N[sampled_N],
        normalize_by_std=objective.normalize_by_std,
        baseline=objective.baseline,
    )
    return advantages_N


def weigh_responses(objective: ObjectiveConfig, batch: TrainingBatch, advantages_N: Tensor, limit: int) -> TrainingBatch:
    """The batch with its advantages, and with the weight of each response's tokens in the two losses, normalisers included. A
    given response has no weight in the policy loss, nor in its normaliser, the entropy bonus and the KL to the reference.

    Args:
        limit: the most tokens that a response may have.
    """
    lengths_N = torch.tensor([len(rollout.response_token_ids) for rollout in batch.rollouts])
    truncated_N = torch.tensor([rollout.finish_reason == "length" for rollout in batch.rollouts])
    dropped_N = batch.given_N | (truncated_N if objective.truncated == "drop" else torch.zeros_like(truncated_N))
    distilled_N = distillation_weights(lengths_N, batch.distil_N, objective.aggregation, limit, objective.kd.denominator)
    if batch.teacher_shares_N is not None:
        distilled_N = distilled_N * batch.teacher_shares_N  # beta is multiplied by the shares of the response's teachers
    return batch.with_weights(
        advantages_N=advantages_N,
        policy_weights_N=response_weights(lengths_N, objective.aggregation, limit, dropped_N),
        distillation_weights_N=distilled_N,
    )


def _log_ratio_sums(batch: TrainingBatch, mask_stop_token: bool) -> Tensor:
    """sum_t (log T - log pi) of each response [N], pi as the sampler reported it, times the shares of its teachers where there
    are several; 0 where the teacher did not score it."""
    teacher: Sequence[TokenFloats | None] = batch.teacher_log_probs or [None] * len(batch.rollouts)
    sums = []
    scored = batch.scored()
    for index, (rollout, scores) in enumerate(zip(batch.rollouts, teacher, strict=True)):
        tokens = len(rollout.response_token_ids) - (mask_stop_token and rollout.finish_reason == "stop")
        tokens = min(tokens, scored.get(index, 0))
        difference = None if scores is None else scores.astype("float64") - rollout.sampler_log_probs
        sums.append(0.0 if difference is None else float(difference[:tokens].sum()))
    sums_N = torch.tensor(sums, dtype=torch.float64)
    return sums_N if batch.teacher_shares_N is None else sums_N * batch.teacher_shares_N


def _column(rollouts: Sequence[Rollout], name: str) -> Tensor:
    return torch.tensor([getattr(rollout, name) for rollout in rollouts])
