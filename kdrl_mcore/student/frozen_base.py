"""The base model of the student's adapters as its reference and its teacher: the student with its adapters off, not a second
copy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from kdrl_mcore.model.lora import without_adapters
from kdrl_mcore.model.scoring import score_rollouts
from kdrl_mcore.student.self_teacher import SelfTeacher
from kdrl_mcore.types import Rollout, TokenFloats


class FrozenBase(SelfTeacher):
    """Scores given tokens with the student's frozen weights, in the student's layout. Its head is the student's, which has no
    adapter."""

    def weights(self) -> AbstractContextManager[None]:
        """Inside it the student's adapters are off. No communication."""
        return without_adapters(self.chunks)

    def score(self, rollouts: Sequence[Rollout], *, temperature: float, micro_tokens: int) -> list[TokenFloats]:
        """log p(o_t | s_t) [response tokens] for each rollout, on every rank. Collective over the world."""
        with self.weights():
            scored = score_rollouts(self._student.parts, rollouts, temperature=temperature, micro_tokens=micro_tokens)
        return [log_probs for log_probs, _ in scored]
