"""Forward-only scoring through Megatron's pipeline schedule: the log-probs and entropies of given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from kdrl_mcore.model.gpt import LanguageModel, ModelParts
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.packing import PackedBatch, pack, plan_micro_batches
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.types import Rollout, TokenFloats
from kdrl_mcore.vocab_parallel import head_log_probs


@torch.no_grad()
def score_rollouts(
    parts: ModelParts, rollouts: Sequence[Rollout], *, temperature: float, micro_tokens: int
) -> list[tuple[TokenFloats, TokenFloats]]:
    """Log-probs and entropies [response tokens] of every rollout under this model, on every rank.

    The rollouts are balanced over the model's own data-parallel replicas. Collectives: the model's pipeline and
    tensor-parallel ones, then `gather_from_replicas`. Every rank of the model's groups must call it with the same rollouts.
    """
    if not rollouts:
        return []
    layout = parts.groups.layout
    lengths = [rollout.num_tokens for rollout in rollouts]
    plan = plan_micro_batches(lengths, layout.data, micro_tokens, layout.pipeline if layout.virtual_pipeline else 1)
    batches = [
        pack([(i, rollouts[i].prompt_token_ids, rollouts[i].response_token_ids) for i in items], layout.token_alignment).to(
            device()
        )
        for items in plan[parts.groups.data.rank()]
    ]
    scored = _run_forward(parts, batches, temperature)
    by_index = dict(gather_from_replicas(parts.groups, scored))
    return [by_index[index] for index in range(len(rollouts))]


def _run_forward(
    parts: ModelParts, batches: list[PackedBatch], temperature: float
) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """(rollout index, (log-probs, entropies)) of this replica's micro-batches; empty on all but the last stage."""

    def forward_step(iterator: Iterator[PackedBatch], chunk: LanguageModel) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return chunk.run_batch(batch), partial(collect, chunk, batch)

    def collect(chunk: LanguageModel, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        log_probs, entropy = head_log_probs(
            hidden.squeeze(1),
            chunk.head_weight(),
            batch.rows_T,
            batch.targets_T,
            chunk.shard,
            temperature=temperature,
            sequence_parallel=parts.config.sequence_parallel,
        )
        return (
            hidden.new_zeros(()),
            torch.zeros((), dtype=torch.int),
            (batch.spans, log_probs.cpu().numpy(), entropy.cpu().numpy()),
        )

    groups = parts.groups
    results = mcore.forward_backward_function(groups.layout.pipeline, groups.layout.virtual_pipeline)(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in parts.chunks],
        model=parts.chunks,
        num_microbatches=len(batches),
        seq_length=1,  # only a hint: variable_seq_lengths sends each micro-batch's own shape
        micro_batch_size=1,
        forward_only=True,
        p2p_communicator=P2PCommunicator(groups.pipeline, parts.config),
        pg_collection=groups.groups,
    )
    return [
        (index, (log_probs[start:stop], entropy[start:stop]))
        for spans, log_probs, entropy in results
        for index, start, stop in spans
    ]
