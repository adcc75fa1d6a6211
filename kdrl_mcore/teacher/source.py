"""Sources of scores: the interface of a teacher to the rest of the program, and scoring with a model of this job.

The objective determines which scores of each token it needs (`config.derived.wanted_scores`). Only the source knows where the
weights are, and which prompt they read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from kdrl_mcore.config.derived import DISTRIBUTION, LOG_PROBS
from kdrl_mcore.model.gpt import LanguageModel, ModelParts
from kdrl_mcore.model.scoring import run_forward, score_rollouts, scoring_plan, span_rows
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.teacher.hidden_states import HiddenStates
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.types import Rollout


class ScoreSource(Protocol):
    """Scores given tokens.

    Attributes:
        chunks: the model chunks that it runs on this rank, so that their forward passes can be monitored.
    """

    @property
    def chunks(self) -> Sequence[LanguageModel]: ...

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """The wanted scores of these rollouts, by their index. Collective over the world: every rank calls it with the same
        rollouts."""
        ...


def as_read(rollouts: Mapping[int, Rollout], name: str | None) -> Mapping[int, Rollout]:
    """The rollouts after the prompts that the teacher of this name reads; None for their own prompts."""
    if name is None:
        return rollouts
    return {index: rollout.after(rollout.teacher_prompts[name]) for index, rollout in rollouts.items()}


def score_with(
    parts: ModelParts, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
) -> TeacherScores:
    """The wanted scores of these rollouts under a model of this job, all from one pass. Collective over the world.

    Hidden states stay, in host memory, on the first context-parallel rank of the last stage of the replica that computed them.
    """
    indices, responses = list(rollouts), list(rollouts.values())
    layout, keeps = parts.groups.layout, parts.groups.is_replica_leader and parts.groups.context.rank() == 0
    local: dict[int, Tensor] = {}

    def keep(_: LanguageModel, batch: PackedBatch, hidden_SH: Tensor) -> list[None]:
        states = _of_whole_responses(parts, batch, responses, hidden_SH)
        if keeps:
            local.update((indices[item], rows.cpu()) for item, rows in states.items())
        return []

    distribution, values = DISTRIBUTION in wanted, LOG_PROBS in wanted
    scored = []
    if values and responses:
        on_hidden = keep if distribution else None
        scored = score_rollouts(parts, responses, temperature=temperature, micro_tokens=micro_tokens, on_hidden=on_hidden)
    elif responses:
        run_forward(parts, responses, micro_tokens, keep)
    hidden = None
    if distribution:
        owner = {
            indices[item]: layout.rank(pipeline=layout.pipeline - 1, data=data)
            for data, batches in enumerate(scoring_plan(parts, responses, micro_tokens))
            for items in batches
            for item in items
        }
        hidden = HiddenStates(parts.config.hidden_size, parts.config.params_dtype, owner, local)
    return TeacherScores(
        scored={index: len(each.response_token_ids) for index, each in rollouts.items()},
        log_probs={index: log_probs for index, (log_probs, _) in zip(indices, scored, strict=False)},
        entropies={index: entropies for index, (_, entropies) in zip(indices, scored, strict=False)},
        hidden=hidden,
    )


def _of_whole_responses(
    parts: ModelParts, batch: PackedBatch, responses: Sequence[Rollout], hidden_SH: Tensor
) -> dict[int, Tensor]:
    """The hidden states that predict each response's tokens [response tokens, H], by its index in `responses`. Under context
    parallelism every rank has some of a response's rows, and a SUM all-reduce over the group joins them."""
    if parts.config.sequence_parallel:
        hidden_SH = gather_from_sequence_parallel_region(hidden_SH, False, parts.groups.tensor)
    states_TH = hidden_SH[batch.rows_T]
    if parts.groups.layout.context == 1:
        return {span.rollout: states_TH[rows] for span, rows in span_rows(batch.spans)}
    lengths = [len(responses[item].response_token_ids) for item in sorted(batch.order)]
    whole = dict(zip(sorted(batch.order), states_TH.new_zeros(sum(lengths), states_TH.size(1)).split(lengths), strict=True))
    for span, rows in span_rows(batch.spans):
        whole[span.rollout][span.start : span.stop] = states_TH[rows]
    for states in whole.values():
        dist.all_reduce(states, group=parts.groups.context)
    return whole
