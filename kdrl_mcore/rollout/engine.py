"""The interface of rollout engines: prompts in, sampled responses out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.types import FinishReason, Prompt, Rollout, TokenIds


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        key: the random key of the call, so that each call draws different numbers.
        verify: also verify the responses, if the engine can (`RolloutEngine.verifies`).
        part_tokens: the smallest number of tokens in a part for `OnPart`; 0: never call it.
        top_p, top_k, min_p: which of the likeliest tokens are drawn (`vocab_parallel.Support`); log-probs are those of the
            truncated distribution.
        experts: record the experts that the student's routers choose (`Rollout.experts`).
        stop: a response also ends with the token that completes one of these in its text (`stops.StopStrings`).
    """

    temperature: float
    top_p: float
    max_response_tokens: int
    responses_per_prompt: int
    key: tuple[int, ...]
    verify: bool = False
    part_tokens: int = 0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    experts: bool = False


@dataclass(frozen=True)
class Request:
    """Responses to one prompt that are begun, or one that is continued.

    Attributes:
        key: makes the draws of the requests of one step different from others', as `Sampling.key`.
        first: the number of the first response among those of the key; draws follow from it and the key.
        count: how many responses; 1 if one is continued.
        tokens: the most tokens to sample of each now.
        begun: the response to continue.
    """

    prompt: Prompt
    key: tuple[int, ...]
    first: int
    count: int
    tokens: int
    begun: Rollout | None = None

    @property
    def token_ids(self) -> TokenIds:
        """What the model reads first: the prompt, and what was sampled of the response."""
        if self.begun is None:
            return self.prompt.token_ids
        return np.concatenate((self.prompt.token_ids, self.begun.response_token_ids))

    @property
    def position(self) -> int:
        """The number of response tokens before the first one to sample."""
        return 0 if self.begun is None else len(self.begun.response_token_ids)


def with_beginning(request: Request, part: Rollout, limit: int, decode: Callable[[TokenIds], str]) -> Rollout:
    """The response that a request continues, with the part that was sampled now; "partial" if it did not end and has fewer
    than `limit` tokens."""
    begun, tokens = request.begun, request.position + len(part.response_token_ids)
    reason: FinishReason = "stop" if part.finish_reason == "stop" else "length" if tokens >= limit else "partial"
    if begun is None:
        return replace(part, finish_reason=reason)
    versions = list(begun.versions)
    for version, count in part.versions:
        before = versions.pop()[1] if versions[-1][0] == version else 0
        versions.append((version, before + count))
    experts = None
    if begun.experts is not None and part.experts is not None:  # what was read again were the tokens before these
        experts = np.concatenate((begun.experts, part.experts[len(begun.experts) :]))
    response = np.concatenate((begun.response_token_ids, part.response_token_ids))
    return replace(
        part,
        prompt_token_ids=begun.prompt_token_ids,
        response_token_ids=response,
        sampler_log_probs=np.concatenate((begun.sampler_log_probs, part.sampler_log_probs)),
        finish_reason=reason,
        weight_version=versions[0][0],
        later_versions=tuple(versions[1:]),
        response=decode(response),
        continuations=begun.continuations + 1,
        experts=experts,
    )


OnPart = Callable[[Mapping[int, Rollout]], None]
"""Receives whole verified groups, by the responses' indices in the batch, while others are still being sampled. Collective over
the world."""


class Weights(Protocol):
    """A model that engines sample with: the student, or one that is only evaluated."""

    parts: ModelParts
    version: int

    def wait_for_weights(self) -> None:
        """Called before the weights are read other than by a forward pass."""


class RolloutEngine(Protocol):
    """Samples with the weights that the student had at the last `refit`. Every method is collective over the world."""

    verifies: bool
    """Whether it verifies responses while others are still being sampled, if `Sampling.verify` is set."""

    def refit(self, student: Weights) -> None:
        """Receive the student's current weights, and be ready to sample."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """Sample `responses_per_prompt` responses to each prompt; the result is in the order of the prompts, on every rank.

        Every rank passes the same prompts. An engine that verifies calls `on_part` meanwhile with parts of the batch of at
        least `part_tokens` tokens, each group at most once.
        """
        ...

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Sample at most the number of tokens of each response that its request allows, and verify none.

        Every rank passes the same requests.

        Args:
            sampling: only its rules for drawing tokens and `max_response_tokens` are used; a response that has fewer tokens and
                did not end is "partial".

        Returns:
            The responses so far in the order of the requests, whose indices are their groups, on every rank.
        """
        ...

    def sleep(self) -> None:
        """Leave the devices to training; `refit` wakes the engine."""
        ...

    def close(self) -> None:
        """End everything that the engine started. Not collective, so that it can be called after an error."""
        ...


Choose = Callable[[Sequence[int]], Sequence[int] | None]
"""Called with the tickets whose responses are complete, in the order of completion; returns those to take out now, or None to
wait for more. Called on rank 0, again after each further completion."""


class FlowingEngine(RolloutEngine, Protocol):
    """An engine that samples while the ranks do other work. A refit may come at any time: a setting of the engine determines
    how unfinished responses continue."""

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, indices: Sequence[int] | None = None) -> list[int]:
        """Begin to sample, after what was submitted before. Returns a ticket for each prompt, the same on every rank. No
        communication among ranks; every rank passes the same.

        Args:
            indices: each prompt's number among those that share the sampling's key, which determines its draws; by default its
                index in `prompts`.
        """
        ...

    def collect(self, choose: Choose) -> dict[int, list[Rollout]]:
        """Take out the complete and verified groups that `choose` returns, in its order, on every rank. Collective over the
        world."""
        ...
