"""Score given tokens, their log-probs and entropies, with Megatron's forward-only pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from kdrl_mcore.model.gpt import LanguageModel, ModelParts
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.micro_batches import plan_micro_batches, shapes_of
from kdrl_mcore.parallel.packing import PackedBatch, Span, pack
from kdrl_mcore.types import Rollout, TokenFloats
from kdrl_mcore.vocab_parallel import Support, head_log_probs

T = TypeVar("T")


@torch.no_grad()
def score_rollouts(
    parts: ModelParts,
    rollouts: Sequence[Rollout],
    *,
    temperature: float,
    micro_tokens: int,
    on_hidden: Callable[[LanguageModel, PackedBatch, Tensor], Any] | None = None,
    support: Support | None = None,
    replay_experts: bool = False,
) -> list[tuple[TokenFloats, TokenFloats]]:
    """Log-probs and entropies [response tokens] of every rollout under this model, on every rank.

    The rollouts are balanced over the model's own data-parallel replicas. Collectives: the model's pipeline, tensor- and
    context-parallel ones, then `gather_from_replicas`. Every rank of the world must call it with the same rollouts.

    Args:
        support: the model's distribution is truncated to it; log-probs of tokens outside are below `OUTSIDE`.
        replay_experts: whether each token takes the experts that its sampler chose (`Rollout.experts`).
        on_hidden: also called for each micro-batch, with the same arguments as `collect` of `run_forward`.
    """
    if not rollouts:
        return []

    def log_probs_and_entropy(
        chunk: LanguageModel, batch: PackedBatch, hidden_SH: Tensor
    ) -> list[tuple[tuple[Span, ...], Tensor]]:
        if on_hidden is not None:
            on_hidden(chunk, batch, hidden_SH)
        inputs_SH, weight_VH, adapter_VR = chunk.head_inputs(hidden_SH)
        values = head_log_probs(
            inputs_SH,
            weight_VH,
            batch.rows_T,
            batch.targets_T,
            chunk.shard,
            temperature=temperature,
            adapter_VR=adapter_VR,
            sequence_parallel=parts.config.sequence_parallel,
            support=support,
        )
        # Results stay on the device until all are there, so the host can continue with the next micro-batch.
        return [(batch.spans, torch.stack(tuple(values)).float())]

    mine: list[tuple[Span, Any]] = []
    found = run_forward(parts, rollouts, micro_tokens, log_probs_and_entropy, replay_experts=replay_experts)
    for spans, values_2T in found:
        on_host = values_2T.cpu().numpy()
        mine += [(span, on_host[:, rows]) for span, rows in span_rows(spans)]
    scored = gather_from_replicas(parts.groups, mine)
    shape = [len(rollout.response_token_ids) for rollout in rollouts]
    log_probs, entropies = ([np.zeros(length, np.float32) for length in shape] for _ in range(2))
    for span, values in scored:
        log_probs[span.rollout][span.start : span.stop], entropies[span.rollout][span.start : span.stop] = values
    return list(zip(log_probs, entropies, strict=True))


@torch.no_grad()
def run_forward(
    parts: ModelParts,
    rollouts: Sequence[Rollout],
    micro_tokens: int,
    collect: Callable[[LanguageModel, PackedBatch, Tensor], list[T]],
    *,
    replay_experts: bool = False,
) -> list[T]:
    """Megatron's forward-only schedule over this replica's share of the rollouts.

    Args:
        collect: (last chunk, micro-batch, its final hidden states [S (/tp under sequence parallelism), H]) -> results.

    Returns:
        All results of `collect` on the ranks of the last pipeline stage, an empty list on the others.
    """
    groups, layout = parts.groups, parts.groups.layout
    batches = [
        pack(
            [(i, rollouts[i].prompt_token_ids, rollouts[i].response_token_ids) for i in items],
            layout.token_alignment,
            share_prompts=parts.share_prompts,
            context_rank=groups.context.rank(),
            context_size=layout.context,
            experts={i: each for i in items if (each := rollouts[i].experts) is not None} if replay_experts else None,
        )
        for items in scoring_plan(parts, rollouts, micro_tokens)[groups.data.rank()]
    ]

    def forward_step(iterator: Iterator[PackedBatch], chunk: LanguageModel) -> tuple[Tensor, Any]:
        batch = next(iterator).on_device()
        with nullcontext() if parts.replay is None else parts.replay.forward(chunk, batch.experts_SLK):
            hidden = chunk.run_batch(batch)
        return hidden, partial(finish, chunk, batch)

    def finish(chunk: LanguageModel, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor, list[T]]:
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), collect(chunk, batch, hidden.squeeze(1))

    results = mcore.forward_backward_function(layout.pipeline, layout.virtual_pipeline)(
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
    if parts.replay is not None:
        parts.replay.finish()
    return [item for result in results for item in result]


def scoring_plan(parts: ModelParts, rollouts: Sequence[Rollout], micro_tokens: int) -> list[list[list[int]]]:
    """plan[data-parallel rank][micro-batch] = the indices of its rollouts, as `run_forward` assigns them."""
    layout = parts.groups.layout
    multiple_of = layout.pipeline if layout.virtual_pipeline else 1
    sequences = ((i, rollout.prompt_token_ids, rollout.response_token_ids) for i, rollout in enumerate(rollouts))
    shapes = shapes_of(sequences, share_prompts=parts.share_prompts)
    return plan_micro_batches(shapes, layout.data, micro_tokens * layout.context, multiple_of)


def span_rows(spans: Sequence[Span]) -> Iterator[tuple[Span, slice]]:
    """Each span with its loss rows in the micro-batch."""
    start = 0
    for span in spans:
        yield span, slice(start, start + span.stop - span.start)
        start += span.stop - span.start
