"""One iteration of supervised fine-tuning: -log pi(target) on given responses, through the same batches, student and
optimizer as KDRL."""

from __future__ import annotations

import numpy as np
import torch

from kdrl_mcore.experience import Experience
from kdrl_mcore.job import Job
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.objective.aggregation import response_weights
from kdrl_mcore.step_metrics import update_metrics
from kdrl_mcore.types import Rollout


def run_supervised_iteration(job: Job, clock: Clock) -> dict[str, float]:
    """One optimizer step on the next prompts and their given responses. Collective over the world."""
    assert job.prompts is not None
    rollouts = []
    for group, prompt in enumerate(job.prompts.next_batch()):
        assert prompt.target is not None
        nothing = np.zeros(len(prompt.target), dtype=np.float32)
        rollouts.append(Rollout(prompt.prompt_id, group, prompt.token_ids, prompt.target, nothing, "stop", job.student.version))
    lengths_N = torch.tensor([len(rollout.response_token_ids) for rollout in rollouts])
    zeros_N = torch.zeros(len(rollouts))
    with clock("train"):
        experience = Experience(rollouts, zeros_N.bool()).with_weights(
            advantages_N=zeros_N,
            policy_weights_N=response_weights(
                lengths_N, job.config.objective.aggregation, job.config.rollout.max_response_tokens
            ),
            distillation_weights_N=zeros_N,
        )
        update = job.update_supervised(experience)
    metrics = update_metrics(rollouts, [update], clock)
    return {**metrics, **job.utilization(rollouts, metrics["time/train"])}
