"""A rollout batch with the per-response quantities that an update needs, and its division into micro-batches.

N responses of the global batch, T loss rows of a micro-batch, C rows of a chunk of it, D rows that the teacher scored, G its
hidden size. Every rank holds the same `TrainingBatch` and cuts its own micro-batches from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.objective.joint import TokenBatch
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.parallel.micro_batches import Shape, plan_micro_batches, shapes_of
from kdrl_mcore.parallel.packing import Span, is_scored, lay_out_rows, pack
from kdrl_mcore.parallel.platform import to_device
from kdrl_mcore.student.student import Measures, MicroBatch
from kdrl_mcore.teacher.hidden_states import States
from kdrl_mcore.types import Rollout, TokenFloats
from kdrl_mcore.vocab_parallel import HeadTokens

BatchLoss = Callable[[HeadTokens, bool, TokenBatch], tuple[Tensor, Measures]]
"""(tokens of a chunk, whether they have divergences from the teacher, their batch) -> (loss of each token [C], measures)."""


@dataclass(frozen=True)
class TrainingBatch:
    """Per-response quantities of one update's global batch, in the order of `rollouts`.

    Attributes:
        distil_N: which responses are distilled.
        on_policy: whether the student's present weights sampled the rollouts.
        teacher_log_probs: log T [response tokens] of each response, None where the teacher did not score it.
        teacher_entropies: the teacher's entropies likewise, where the token weights ask for them.
        teacher_hidden: the teacher's hidden states, for a divergence over the vocabulary.
        scored_N: how many tokens of each response, from its start, the teacher scored; None if it scored whole responses.
        old_log_probs: log pi_old [response tokens] of each response (or log mu, see `objective.clip_against`), or None if
            strictly on-policy.
        reference_log_probs: log pi_ref [response tokens] of each response, or None without a reference KL.
        scores: log pi and entropy [response tokens] of each response at the present weights, where a setting needs whole
            responses before the update (`config.derived.needs_scores`).
        advantages_N: group-relative advantages.
        policy_weights_N, distillation_weights_N: the weight of each token of a response in the two global losses; the
            normaliser is included.
        correct_N: whether the response is correct; None if the loss does not need it.
        token_weights: a weight of each token's distillation [response tokens] for each response; None where all are 1.
        sequence_ratios_N: pi / pi_old over the response, where `objective.ratio` asks for it; otherwise None.
        sequence_log_ratios_N: log pi_old / mu over the response, for a correction of whole sequences; otherwise None.
        kd_log_ratios_N: log pi / mu over the response, for a correction of distillation by whole sequences; otherwise None.
        ends_masked_N: whether the response's last token is left out of distillation (bool); None if none is.
        teacher_shares_N: the sum of the shares that each response's teachers have of beta; None for one teacher.
        taught_by_N: which of several teachers teach each response, as a sum of 2^k; None for one teacher.
        draws: numbers from [0, 1) [response tokens] for each response, where `objective.kd.mix` draws; otherwise None.
    """

    rollouts: Sequence[Rollout]
    distil_N: Tensor
    on_policy: bool = False
    teacher_log_probs: Sequence[TokenFloats | None] | None = None
    teacher_hidden: States | None = None
    old_log_probs: Sequence[TokenFloats] | None = None
    reference_log_probs: Sequence[TokenFloats] | None = None
    scores: Sequence[tuple[TokenFloats, TokenFloats]] | None = None
    teacher_entropies: Sequence[TokenFloats | None] | None = None
    scored_N: Tensor | None = None
    teacher_shares_N: Tensor | None = None
    taught_by_N: Tensor | None = None
    advantages_N: Tensor = field(default_factory=lambda: torch.empty(0))
    policy_weights_N: Tensor = field(default_factory=lambda: torch.empty(0))
    distillation_weights_N: Tensor = field(default_factory=lambda: torch.empty(0))
    correct_N: Tensor | None = None
    token_weights: Sequence[TokenFloats | None] | None = None
    sequence_ratios_N: Tensor | None = None
    sequence_log_ratios_N: Tensor | None = None
    kd_log_ratios_N: Tensor | None = None
    ends_masked_N: Tensor | None = None
    draws: Sequence[TokenFloats] | None = None

    @property
    def given_N(self) -> Tensor:
        """Which responses were given, not sampled (bool)."""
        return torch.tensor([rollout.given for rollout in self.rollouts], dtype=torch.bool)

    def with_weights(self, *, advantages_N: Tensor, policy_weights_N: Tensor, distillation_weights_N: Tensor) -> TrainingBatch:
        """The same batch with these advantages and weights."""
        return replace(
            self, advantages_N=advantages_N, policy_weights_N=policy_weights_N, distillation_weights_N=distillation_weights_N
        )

    def split_by_group(self, parts: int) -> list[TrainingBatch]:
        """Split into `parts` batches of whole groups, in order; each gets its share of the given responses, too. Empty batches
        are left out."""
        sampled, given = ([each for each in self.rollouts if each.given == kind] for kind in (False, True))
        kinds = [list(dict.fromkeys(rollout.group_id for rollout in rollouts)) for rollouts in (sampled, given)]
        result = []
        for part in range(parts):
            cuts = [groups[part * len(groups) // parts : (part + 1) * len(groups) // parts] for groups in kinds]
            wanted = {group for groups in cuts for group in groups}
            index = [i for i, rollout in enumerate(self.rollouts) if rollout.group_id in wanted]
            if index:
                result.append(self._take(index))
        return result

    def _take(self, index: list[int]) -> TrainingBatch:
        def pick(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in index]

        rollouts = pick(self.rollouts)
        assert rollouts is not None
        return TrainingBatch(
            rollouts,
            self.distil_N[index],
            self.on_policy,
            pick(self.teacher_log_probs),
            None if self.teacher_hidden is None else self.teacher_hidden.select(index),
            pick(self.old_log_probs),
            pick(self.reference_log_probs),
            pick(self.scores),
            pick(self.teacher_entropies),
            None if self.scored_N is None else self.scored_N[index],
            None if self.teacher_shares_N is None else self.teacher_shares_N[index],
            None if self.taught_by_N is None else self.taught_by_N[index],
        )

    def scored(self) -> dict[int, int]:
        """How many tokens of each distilled response, from its start, the teacher scored."""
        distilled = self.distil_N.nonzero().squeeze(1).tolist()
        if self.scored_N is None:
            return {i: len(self.rollouts[i].response_token_ids) for i in distilled}
        return {i: int(self.scored_N[i]) for i in distilled}

    def bad_log_probs(self) -> str | None:
        """A description of the first log-prob that is NaN or infinite, or None. All ranks hold the same batch, so all get the
        same answer."""
        named = {
            "sampler": [rollout.sampler_log_probs for rollout in self.rollouts],
            "teacher": self.teacher_log_probs,
            "old-policy": self.old_log_probs,
            "reference": self.reference_log_probs,
        }
        for name, values in named.items():
            for rollout, value in zip(self.rollouts, values or (), strict=False):
                if value is not None and not np.isfinite(value).all():
                    return f"a {name} log-prob of prompt {rollout.prompt_id} is not finite"
        return None

    def token_batch(self, spans: Sequence[Span]) -> TokenBatch:
        """The loss rows of one micro-batch."""
        indices = [span.rollout for span in spans]
        counts = torch.tensor([span.stop - span.start for span in spans], dtype=torch.long)

        def spread(values_N: Tensor) -> Tensor:
            return values_N[indices].float().repeat_interleave(counts)

        def spread_if_known(values_N: Tensor | None) -> Tensor | None:
            return None if values_N is None else spread(values_N)

        def join(values: Sequence[TokenFloats | None] | None) -> Tensor | None:
            if values is None:
                return None
            rows = [
                np.zeros(stop - start, np.float32) if (value := values[index]) is None else value[start:stop]
                for index, start, stop in spans
            ]
            return torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0)

        given_N = self.given_N
        sampler = join([rollout.sampler_log_probs for rollout in self.rollouts])
        assert sampler is not None
        return TokenBatch(
            advantages=spread(self.advantages_N),
            policy_weights=spread(self.policy_weights_N),
            distillation_weights=spread(self.distillation_weights_N),
            sampler_log_probs=sampler,
            on_policy=self.on_policy,
            old_log_probs=join(self.old_log_probs),
            teacher_log_probs=join(self.teacher_log_probs),
            reference_log_probs=join(self.reference_log_probs),
            correct=spread_if_known(self.correct_N),
            scored=self._scored_rows(spans),
            token_weights=join(self.token_weights),
            draws=join(self.draws),
            sequence_ratios=spread_if_known(self.sequence_ratios_N),
            sequence_log_ratios=spread_if_known(self.sequence_log_ratios_N),
            kd_log_ratios=spread_if_known(self.kd_log_ratios_N),
            given=spread(given_N) if given_N.any() else None,
            taught_by=None if self.taught_by_N is None else self.taught_by_N[indices].repeat_interleave(counts),
        )

    def _scored_rows(self, spans: Sequence[Span]) -> Tensor | None:
        """1 for the tokens that the teacher scored and that are not left out, else 0; None if all of these spans' are."""
        if self.scored_N is None and self.ends_masked_N is None:
            return None
        lengths = [len(rollout.response_token_ids) for rollout in self.rollouts]
        first = torch.tensor(lengths) if self.scored_N is None else self.scored_N
        if self.ends_masked_N is not None:
            first = torch.minimum(first, torch.tensor(lengths) - self.ends_masked_N.long())
        stops = first.tolist()
        rows = [torch.arange(start, stop) < stops[index] for index, start, stop in spans]
        return torch.cat([torch.empty(0), *(row.float() for row in rows)])


def micro_batches(
    batch: TrainingBatch,
    loss: BatchLoss,
    groups: ModelGroups,
    micro_tokens: int,
    *,
    share_prompts: bool,
    replay_experts: bool = False,
) -> list[MicroBatch]:
    """This rank's micro-batches, each of at most `micro_tokens` tokens per rank and with the loss of its tokens.

    Every rank computes the same plan. If the batch has hidden states of the teacher, the call is collective over the world:
    they are delivered by an all-to-all, then broadcast over the tensor-parallel group. Otherwise nothing is communicated.
    """
    rollouts, layout = batch.rollouts, groups.layout
    scored = batch.scored()
    sequences = [(i, rollout.prompt_token_ids, rollout.response_token_ids) for i, rollout in enumerate(rollouts)]
    shapes = shapes_of(sequences, share_prompts=share_prompts)
    plan = plan_micro_batches(
        shapes,
        layout.data,
        micro_tokens * layout.context,
        layout.pipeline if layout.virtual_pipeline else 1,
    )
    result = []
    for number, items in enumerate(plan[groups.data.rank()]):
        packed = pack(
            [sequences[i] for i in items],
            layout.token_alignment,
            share_prompts=share_prompts,
            scored=scored,
            context_rank=groups.context.rank(),
            context_size=layout.context,
            experts={i: each for i in items if (each := rollouts[i].experts) is not None} if replay_experts else None,
        ).on_device()
        hidden_DG = None
        if batch.teacher_hidden is not None:
            hidden_DG = _deliver(batch.teacher_hidden, [[shapes[i] for i in bins[number]] for bins in plan], scored, groups)
        tokens = batch.token_batch(packed.spans).map(to_device)
        mu_T = None if batch.on_policy else tokens.sampler_log_probs
        given_T = None if tokens.given is None else tokens.given != 0
        result.append(MicroBatch(packed, partial(_loss_of_rows, loss, tokens), mu_T, hidden_DG, given_T))
    return result


def _loss_of_rows(
    loss: BatchLoss, batch: TokenBatch, tokens: HeadTokens, has_divergences: bool, rows: slice
) -> tuple[Tensor, Measures]:
    return loss(tokens, has_divergences, batch[rows])


def _deliver(
    hidden: States,
    shapes_of_rank: Sequence[Sequence[Shape]],
    scored: Mapping[int, int],
    groups: ModelGroups,
) -> Tensor | None:
    """The teacher's hidden states [D, G] of this rank's scored loss rows, in host memory; None except on the last stage."""
    layout, last = groups.layout, groups.layout.pipeline - 1
    wanted: dict[int, list[Span]] = {}
    for data, shapes in enumerate(shapes_of_rank):
        for context in range(layout.context):
            packed = lay_out_rows(
                shapes, layout.token_alignment, scored=scored, context_rank=context, context_size=layout.context
            )
            spans = [span for span, _ in packed.spans if is_scored(span, scored)]
            wanted[layout.rank(pipeline=last, data=data, context=context)] = spans
    states = hidden.deliver(wanted)
    if not groups.is_last_stage:
        return None
    if layout.tensor > 1:
        leader = dist.get_global_rank(groups.tensor, 0)
        spans = wanted[leader]
        if groups.tensor.rank() > 0:
            states = states.new_empty(sum(stop - start for _, start, stop in spans), hidden.size)
        dist.broadcast(states, leader, group=groups.tensor)
    return states.to("cpu", non_blocking=True)  # pinned on CUDA; stream order puts the copy back to the device after it
