"""One iteration of supervised fine-tuning: -log pi(target) on given responses, with KDRL's batches, student and optimizer."""

from __future__ import annotations

import torch

from kdrl_mcore.job import Job
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.objective.aggregation import response_weights
from kdrl_mcore.step_metrics import domain_metrics, update_metrics, utilization
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.student.update import update_supervised


def run_supervised_iteration(job: Job, step: int, clock: Clock) -> dict[str, float]:
    """Run the step's updates on the next prompts and their given responses. Collective over the world."""
    rollouts = job.source.rollouts(step)
    with clock("train"):
        batches = TrainingBatch(rollouts, torch.zeros(len(rollouts)).bool()).split_by_group(job.config.batch.updates_per_step)
        updates = [update_supervised(job.student, _weighted(job, batch), job.config) for batch in batches]
    metrics = update_metrics(rollouts, updates, clock) | domain_metrics(rollouts, ("response_length",))
    return metrics | utilization(job.student.parts, rollouts, metrics["time/train"], job.config.cluster)


def _weighted(job: Job, batch: TrainingBatch) -> TrainingBatch:
    """The batch with the weight of each response's tokens in the loss, normaliser included."""
    lengths_N = torch.tensor([len(rollout.response_token_ids) for rollout in batch.rollouts])
    zeros_N = torch.zeros(len(batch.rollouts))
    limit = job.config.rollout.max_response_tokens
    return batch.with_weights(
        advantages_N=zeros_N,
        policy_weights_N=response_weights(lengths_N, job.config.objective.aggregation, limit),
        distillation_weights_N=zeros_N,
    )
