"""Partial rollouts: a step samples a limited number of tokens of each response, and unfinished responses continue in the next
step with its weights (Kimi k1.5, arXiv 2501.12599). No step then waits for the longest responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdrl_mcore.rollout.engine import Request, RolloutEngine, Sampling
from kdrl_mcore.rollout.ledger import Entry, is_unfinished
from kdrl_mcore.types import Rollout


@dataclass(frozen=True)
class PartialSampling:
    """Sampling of responses in parts.

    Attributes:
        tokens: the most tokens of a response that are sampled at a time.
        max_continuations: the most continuations of a response; the last one completes it. None: no limit.
    """

    tokens: int
    max_continuations: int | None

    def sample(self, engine: RolloutEngine, entries: Sequence[Entry], sampling: Sampling) -> None:
        """Sample the next part of every unfinished response to these prompts, together. Collective over the world.

        Args:
            sampling: its key is the prefix of each prompt's key.
        """
        asked = [(entry, number, request) for entry in entries for number, request in self._requests(entry, sampling)]
        requests = [request for _, _, request in asked]
        rollouts = iter(engine.sample(requests, replace(sampling, verify=False, part_tokens=0)) if requests else ())
        for entry, number, request in asked:
            entry.record(number, [next(rollouts) for _ in range(request.count)])

    def _requests(self, entry: Entry, sampling: Sampling) -> list[tuple[int, Request]]:
        """For each request for the missing tokens of a group: (number of its first response in the group, request)."""
        if entry.rollouts is not None:
            return []
        assert entry.draw is not None
        key, count, limit = (*sampling.key, *entry.draw.key), sampling.responses_per_prompt, sampling.max_response_tokens
        first = entry.draw.index * count
        if entry.begun is None:
            tokens = limit if self.max_continuations == 0 else min(self.tokens, limit)
            return [(0, Request(entry.prompt, key, first, count, tokens))]
        found = []
        for number, begun in enumerate(entry.begun):
            if is_unfinished(begun):
                left = limit - len(begun.response_token_ids)
                is_last = self.max_continuations is not None and begun.continuations + 1 >= self.max_continuations
                tokens = left if is_last else min(self.tokens, left)
                found.append((number, Request(entry.prompt, key, first + number, 1, tokens, begun)))
        return found


def continuation_metrics(trained: Sequence[Rollout], waiting: Sequence[Entry]) -> dict[str, float]:
    """Metrics: the share of a batch's responses that were continued and how often, and the number of unfinished ones that
    wait."""
    continued = [rollout.continuations for rollout in trained if rollout.continuations]
    unfinished = sum(is_unfinished(rollout) for entry in waiting for rollout in entry.begun or ())
    return {
        "continued_share": len(continued) / len(trained),
        "continuations": sum(continued) / max(1, len(continued)),
        "responses_unfinished": float(unfinished),
    }
