"""The two things that travel between the rooms: a prompt, and a rollout (one sampled response)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]
TokenIds = NDArray[np.int64]
TokenFloats = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from.

    `token_ids` is the templated prompt [prompt tokens]; `answer` is the reference answer the verifier compares with.
    `target` holds the given response's token ids for supervised fine-tuning (end-of-sequence included), else None.
    """

    prompt_id: str
    text: str
    token_ids: TokenIds
    answer: str
    target: TokenIds | None = None


@dataclass
class Rollout:
    """One response to one prompt, with what the sampler, the verifier and the teacher said of it.

    The responses of one prompt share a `group_id`. `sampler_log_probs` [response tokens] is log mu(o_t|s_t) at the
    sampling temperature, as the sampler itself reports it; `teacher_log_probs` is log T(o_t|s_t) likewise, None where the
    teacher was not asked for it. `weight_version` counts the optimizer updates the sampling
    weights had seen. The end-of-sequence token, when sampled, is the last response token.
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

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together: what the trainer pays for this rollout."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)
