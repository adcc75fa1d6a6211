"""One optimizer update, on alpha * L_GRPO + beta * L_KD or on -log pi(target), and the schedules that follow the updates.

C tokens of a chunk of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from torch import Tensor

from kdrl_mcore.config import BatchConfig, Config, ObjectiveConfig
from kdrl_mcore.config.derived import num_updates, truncates, uses_reference
from kdrl_mcore.objective.joint import TokenBatch, divergences_by_teacher, gradient_split, joint_loss, sft_loss
from kdrl_mcore.objective.schedules import Coefficient, learning_rate
from kdrl_mcore.student.batch import BatchLoss, TrainingBatch, micro_batches
from kdrl_mcore.student.student import Measures, MicroBatch, Student, UpdateResult
from kdrl_mcore.vocab_parallel import HeadTokens


def update(student: Student, batch: TrainingBatch, config: Config, alpha: float, beta: float) -> UpdateResult:
    """One optimizer step on alpha * L_GRPO + beta * L_KD; skipped if a log-prob of the batch is NaN or infinite. Collective
    over the world.

    When `logging.gradient_split_every` is due, the gradients of the two losses are measured first, each in a separate pass.
    """
    bad = batch.bad_log_probs()
    if bad is not None:
        return UpdateResult({}, {}, float("nan"), _learning_rate(student, config), bad)
    split = _split_gradient(student, batch, config, alpha, beta)
    result = _optimize(student, batch, _joint_loss(config, alpha, beta), config)
    return replace(result, gradient_split=gradient_split(*split, result.grad_norm)) if split else result


def update_supervised(student: Student, batch: TrainingBatch, config: Config) -> UpdateResult:
    """One optimizer step on -log pi(target). Collective over the world."""
    return _optimize(student, batch, _supervised, config)


def advance_schedules(
    update: UpdateResult, alpha: Coefficient, beta: Coefficient, shares: Mapping[str, Coefficient] = MappingProxyType({})
) -> None:
    """Move alpha, beta and the shares of several teachers by one optimizer step; a skipped update does not count. A share
    follows the KL on the tokens of its teacher. No communication."""
    if update.skipped is None:
        tokens = max(0.0, update.sums.get("distilled_tokens", 0.0) - update.sums.get("given_tokens", 0.0))
        kl = update.sums["kl_k1"] / tokens if tokens else None
        alpha.advance(kl)
        beta.advance(kl)
        for name, share in shares.items():
            own = update.sums.get(f"teacher/{name}/tokens", 0.0)
            share.advance(update.sums[f"teacher/{name}/kl_k1"] / own if own else None)


def _optimize(student: Student, batch: TrainingBatch, loss: BatchLoss, config: Config) -> UpdateResult:
    batches = _micro_batches(batch, loss, student, config.batch)
    return student.update(batches, _learning_rate(student, config))


def _micro_batches(batch: TrainingBatch, loss: BatchLoss, student: Student, settings: BatchConfig) -> list[MicroBatch]:
    return micro_batches(
        batch,
        loss,
        student.groups,
        settings.micro_tokens,
        share_prompts=settings.share_prompts,
        replay_experts=student.parts.replay is not None,
    )


def _learning_rate(student: Student, config: Config) -> float:
    """The learning rate of the next optimizer step."""
    return learning_rate(student.version, num_updates(config), config.optimizer)


def _split_gradient(
    student: Student, batch: TrainingBatch, config: Config, alpha: float, beta: float
) -> tuple[float, float] | None:
    """The norms of the GRPO and distillation gradients, or None unless they are due and are the only two terms of the loss."""
    every, has_reference = config.logging.gradient_split_every, uses_reference(config.objective)
    if every == 0 or student.version % every or not (alpha > 0 and beta > 0) or has_reference:
        return None
    policy, distillation = (
        student.gradient_norm(_micro_batches(batch, _joint_loss(config, *coefficients), student, config.batch))
        for coefficients in ((alpha, 0.0), (0.0, beta))
    )
    return policy, distillation


def _joint_loss(config: Config, alpha: float, beta: float) -> BatchLoss:
    return partial(
        _joint,
        objective=config.objective,
        alpha=alpha,
        beta=beta,
        teachers=tuple(config.teachers),
        is_truncated=truncates(config),
    )


def _joint(
    tokens: HeadTokens,
    has_divergences: bool,
    batch: TokenBatch,
    *,
    objective: ObjectiveConfig,
    alpha: float,
    beta: float,
    teachers: Sequence[str],
    is_truncated: bool,
) -> tuple[Tensor, Measures]:
    log_probs_C, divergence_C, batch = tokens.log_probs, None, batch.without_sampler(tokens.log_probs)
    if is_truncated:
        log_probs_C, batch = batch.within_support(log_probs_C)
    if has_divergences:
        divergence_C = tokens.divergences
        batch = replace(batch, teacher_log_probs=tokens.teacher_log_probs, teacher_entropies=tokens.teacher_entropies)
    loss_C, sums, maxima = joint_loss(log_probs_C, batch, objective, alpha, beta, divergence_C, tokens.entropies)
    if batch.given is not None:
        sums["given_tokens"] = batch.given.sum()
    if batch.taught_by is not None:
        sums |= divergences_by_teacher(log_probs_C, batch, teachers, divergence_C)
    return loss_C, (sums, maxima)


def _supervised(tokens: HeadTokens, _: bool, batch: TokenBatch) -> tuple[Tensor, Measures]:
    counted = tokens.log_probs.new_full((), len(tokens.log_probs))
    return sft_loss(tokens.log_probs, batch.policy_weights), ({"tokens": counted}, {})
