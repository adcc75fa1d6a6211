"""The two types that most packages exchange: a prompt, and a rollout (one sampled response); and which log-probs are those of
tokens of probability 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "partial"]
TokenIds = NDArray[np.int64]
TokenFloats = NDArray[np.float32]
ExpertIds = NDArray[np.integer[Any]]

OUTSIDE = -5e29
"""Log-probs below this number are those of tokens outside the support of a truncated distribution (`vocab_parallel.Support`).
They are not infinite, so that no NaN comes of them."""


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for sampling.

    `token_ids` is the templated prompt [prompt tokens]; `answer` is the reference answer that the verifier compares with.
    `target` holds the token ids of the given response (end-of-sequence included) if the run uses it, otherwise None.
    `domain` is the name of the prompt's source if training has several, otherwise empty; `columns` are the row's values of
    `data.columns`, which rewards may use. `teacher_prompts` holds what teachers read instead of the prompt, by their names.
    """

    prompt_id: str
    text: str
    token_ids: TokenIds
    answer: str
    target: TokenIds | None = None
    domain: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    teacher_prompts: Mapping[str, TokenIds] = field(default_factory=dict)


@dataclass
class Rollout:
    """One response to one prompt, with the results of the sampler, the verifier and the teacher.

    The responses to one prompt share a `group_id`. `sampler_log_probs` [response tokens] is log mu(o_t|s_t) at the
    sampling temperature, as the sampler itself reports it; `teacher_log_probs` is log T(o_t|s_t), None if the teacher did
    not score the response. `weight_version` is the number of optimizer updates behind the weights that sampled the first token;
    if the weights changed during the response, `later_versions` has (version, tokens) for each later version.
    A response that waits to be continued has the finish reason "partial" (only in the ledger); `continuations` counts how often
    it was continued. The end-of-sequence token, if sampled, is the last response token. `domain`, `columns` and
    `teacher_prompts` are the prompt's; rollout files do not keep the columns. `given` marks a response that was not sampled
    (`rollout.given`): it has no sampler and no verdict, and takes part only in distillation. Rollout files hold none.
    `experts` [prompt and response tokens - 1, layers with experts, experts of a token] are those that the sampler chose
    (`rollout.replay_experts`).
    """

    prompt_id: str
    group_id: int
    prompt_token_ids: TokenIds
    response_token_ids: TokenIds
    sampler_log_probs: TokenFloats
    finish_reason: FinishReason
    weight_version: int
    reward: float = 0.0
    correct: bool = False
    prompt: str = ""
    response: str = ""
    answer: str = ""
    teacher_log_probs: TokenFloats | None = None
    extra: dict[str, float] = field(default_factory=dict)
    domain: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False
    later_versions: tuple[tuple[int, int], ...] = ()
    teacher_prompts: Mapping[str, TokenIds] = field(default_factory=dict)
    continuations: int = 0
    experts: ExpertIds | None = None

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """(version of the weights, response tokens that they sampled), in order."""
        later = sum(count for _, count in self.later_versions)
        return ((self.weight_version, len(self.response_token_ids) - later), *self.later_versions)

    def with_response(self, tokens: int) -> Rollout:
        """The same rollout, without experts, with only the first `tokens` tokens of its response; the rollout itself if it has
        no more."""
        if tokens == len(self.response_token_ids):
            return self
        return replace(
            self,
            response_token_ids=self.response_token_ids[:tokens],
            sampler_log_probs=self.sampler_log_probs[:tokens],
            experts=None,
        )

    def after(self, prompt_token_ids: TokenIds) -> Rollout:
        """The same response after another prompt, to be scored."""
        return replace(self, prompt_token_ids=prompt_token_ids, experts=None)

    @property
    def num_tokens(self) -> int:
        """The number of prompt and response tokens together."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)
