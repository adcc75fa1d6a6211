"""A rollout batch with everything the update needs, per response, and its cut into micro-batches of tokens.

N responses of the global batch, T loss rows of a micro-batch. Every rank holds the same `Experience` and cuts its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrl_mcore.objective.joint import TokenBatch
from kdrl_mcore.parallel.packing import PackedBatch, pack, plan_micro_batches
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.student import Measures, TokenLoss
from kdrl_mcore.types import Rollout, TokenFloats


@dataclass(frozen=True)
class Experience:
    """Per-response quantities of one update's global batch, in the order of `rollouts`.

    Attributes:
        distil_N: which responses are distilled.
        teacher_log_probs: log T [T] per response, None where the teacher was not asked.
        old_log_probs: log pi_old [T] per response, or None while strictly on-policy.
        reference_log_probs: log pi_ref [T] per response, or None without a reference KL.
        advantages_N: group-relative advantages.
        policy_weights_N, distillation_weights_N: each response token's share of the global loss (the normaliser is inside).
    """

    rollouts: Sequence[Rollout]
    distil_N: Tensor
    teacher_log_probs: Sequence[TokenFloats | None] | None = None
    old_log_probs: Sequence[TokenFloats] | None = None
    reference_log_probs: Sequence[TokenFloats] | None = None
    advantages_N: Tensor = field(default_factory=lambda: torch.empty(0))
    policy_weights_N: Tensor = field(default_factory=lambda: torch.empty(0))
    distillation_weights_N: Tensor = field(default_factory=lambda: torch.empty(0))

    def with_weights(self, *, advantages_N: Tensor, policy_weights_N: Tensor, distillation_weights_N: Tensor) -> Experience:
        """The same batch with what `iteration.prepare` computed."""
        return replace(
            self, advantages_N=advantages_N, policy_weights_N=policy_weights_N, distillation_weights_N=distillation_weights_N
        )

    def split_by_group(self, parts: int) -> list[Experience]:
        """Whole groups dealt to `parts` batches, in order; empty batches are left out."""
        groups = list(dict.fromkeys(rollout.group_id for rollout in self.rollouts))
        result = []
        for part in range(parts):
            wanted = set(groups[part * len(groups) // parts : (part + 1) * len(groups) // parts])
            index = [i for i, rollout in enumerate(self.rollouts) if rollout.group_id in wanted]
            if index:
                result.append(self._take(index))
        return result

    def _take(self, index: list[int]) -> Experience:
        def pick(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in index]

        rollouts = pick(self.rollouts)
        assert rollouts is not None
        return Experience(
            rollouts,
            self.distil_N[index],
            pick(self.teacher_log_probs),
            pick(self.old_log_probs),
            pick(self.reference_log_probs),
        )

    def bad_log_probs(self) -> str | None:
        """Which given log-probs are NaN or infinite, if any. The same answer on every rank, as all hold the same experience."""
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

    def token_batch(self, spans: Sequence[tuple[int, int, int]]) -> TokenBatch:
        """The loss rows of one micro-batch: `spans` are (response, first row, last row + 1), adjacent."""
        indices = [index for index, _, _ in spans]
        counts = torch.tensor([stop - start for _, start, stop in spans])

        def spread(values_N: Tensor) -> Tensor:
            return values_N[indices].float().repeat_interleave(counts)

        def join(values: Sequence[TokenFloats | None] | None) -> Tensor | None:
            if values is None:
                return None
            rows = [np.zeros(stop - start, np.float32) if (v := values[i]) is None else v for i, start, stop in spans]
            return torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0)

        sampler = join([rollout.sampler_log_probs for rollout in self.rollouts])
        assert sampler is not None
        return TokenBatch(
            advantages=spread(self.advantages_N),
            policy_weights=spread(self.policy_weights_N),
            distillation_weights=spread(self.distillation_weights_N),
            sampler_log_probs=sampler,
            old_log_probs=join(self.old_log_probs),
            teacher_log_probs=join(self.teacher_log_probs),
            reference_log_probs=join(self.reference_log_probs),
        )


def micro_batches(
    experience: Experience,
    loss: Callable[[Tensor, TokenBatch], tuple[Tensor, Measures]],
    *,
    data_rank: int,
    data_size: int,
    micro_tokens: int,
    alignment: int,
    multiple_of: int,
) -> list[tuple[PackedBatch, TokenLoss]]:
    """This data-parallel rank's micro-batches, each with the loss of its tokens. Pure: every rank computes the same plan."""
    rollouts = experience.rollouts
    plan = plan_micro_batches([rollout.num_tokens for rollout in rollouts], data_size, micro_tokens, multiple_of)
    result = []
    for items in plan[data_rank]:
        sequences = [(i, rollouts[i].prompt_token_ids, rollouts[i].response_token_ids) for i in items]
        batch = pack(sequences, alignment).to(device())
        tokens = experience.token_batch(batch.spans).to(device())
        result.append((batch, _bind(loss, tokens)))
    return result


def _bind(loss: Callable[[Tensor, TokenBatch], tuple[Tensor, Measures]], tokens: TokenBatch) -> TokenLoss:
    return lambda log_probs, entropy, rows: loss(log_probs, tokens[rows])
