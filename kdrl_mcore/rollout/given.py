"""Given responses: alone, for supervised fine-tuning, or in addition to those of another source, as the off-policy share of GKD
(arXiv 2306.13649). They come from a column of the training data or from a rollout file, in an order that the seed
determines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_mcore.data.limits import Limits, check_given_length, check_rollouts
from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import DataError
from kdrl_mcore.rollout.engine import OnPart, Sampling, Weights
from kdrl_mcore.rollout.files import read_rollouts
from kdrl_mcore.rollout.source import RolloutSource
from kdrl_mcore.types import Prompt, Rollout


class GivenResponses(RolloutSource):
    """The data set's own responses, for supervised fine-tuning: they were not sampled and have no reward."""

    def __init__(self, prompts: PromptStream, student: Weights) -> None:
        self._prompts, self._student = prompts, student

    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutSource`; the sampler's log-probs are zero."""
        return as_rollouts(self._prompts.next_batch(), self._student.version)

    def first(self, count: int, sampling: Sampling) -> list[Rollout]:
        """See `RolloutSource`."""
        return as_rollouts(self._prompts.first(count), self._student.version)

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`."""
        return {"prompts": self._prompts.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`."""
        self._prompts.load_state_dict(state["prompts"])


class WithGivenResponses(RolloutSource):
    """The rollouts of another source, followed by given responses (so that the others keep their indices), each a separate
    group. At every step the next given responses are drawn, even if the others were sampled steps ahead or are replayed."""

    def __init__(self, source: RolloutSource, given: PromptStream, student: Weights, num_given: Callable[[int], int]) -> None:
        """Args:
        given: prompts with their responses.
        num_given: the number of given responses for a number of others.
        """
        self._source, self._given, self._student, self._num_given = source, given, student, num_given
        self.samples = source.samples

    def rollouts(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutSource`."""
        others = self._source.rollouts(step, on_part)
        given = self._given.next_batch(self._num_given(len(others)))
        first_group = 1 + max((rollout.group_id for rollout in others), default=-1)
        return [*others, *as_rollouts(given, self._student.version, first_group, in_addition=True)]

    def first(self, count: int, sampling: Sampling) -> list[Rollout]:
        """See `RolloutSource`: rollouts of the other source."""
        return self._source.first(count, sampling)

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`: the other source's state and the cursor of the given responses."""
        return {**self._source.state_dict(), "given": self._given.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, resamples: bool = False) -> None:
        """See `RolloutSource`. A run that had no given responses before begins with the first ones."""
        self._source.load_state_dict(state, resamples=resamples)
        if state.get("given") is not None:
            self._given.load_state_dict(state["given"])

    @property
    def counts(self) -> dict[str, float]:
        """See `RolloutSource`."""
        return self._source.counts

    @property
    def chosen(self) -> Sequence[int] | None:
        """See `RolloutSource`."""
        return self._source.chosen

    def refit(self) -> None:
        """See `RolloutSource`."""
        self._source.refit()

    def verify(self, rollouts: Sequence[Rollout]) -> None:
        """See `RolloutSource`. Given responses are not verified."""
        self._source.verify([rollout for rollout in rollouts if not rollout.given])

    def prepare_refit(self) -> None:
        """See `RolloutSource`."""
        self._source.prepare_refit()

    def finish(self) -> None:
        """See `RolloutSource`."""
        self._source.finish()

    def close(self) -> None:
        """See `RolloutSource`."""
        self._source.close()


def as_rollouts(prompts: Sequence[Prompt], version: int, first_group: int = 0, *, in_addition: bool = False) -> list[Rollout]:
    """The given responses to prompts as rollouts that were not sampled: each a separate group, log mu = 0, no verdict."""
    rollouts = []
    for group, prompt in enumerate(prompts, start=first_group):
        assert prompt.target is not None
        rollouts.append(
            Rollout(
                prompt.prompt_id,
                group,
                prompt.token_ids,
                prompt.target,
                sampler_log_probs=np.zeros(len(prompt.target), dtype=np.float32),
                finish_reason="stop",
                weight_version=version,
                prompt=prompt.text,
                answer=prompt.answer,
                domain=prompt.domain,
                given=in_addition,
                teacher_prompts=prompt.teacher_prompts,
            )
        )
    return rollouts


def read_given(path: str | Path, limits: Limits, max_response_tokens: int) -> tuple[list[Prompt], int]:
    """The prompts of a rollout file with their responses, and the number of responses left out because they were cut off, so
    that their last token ends no answer.

    Raises:
        DataError: the file is missing or damaged, has no whole response, or a line exceeds the limits.
    """
    rollouts = read_rollouts(path)
    check_rollouts(rollouts, path, limits)
    whole = []
    for line, rollout in enumerate(rollouts, start=1):
        if rollout.finish_reason == "stop":
            check_given_length(f"{path} line {line}", rollout.response_token_ids, max_response_tokens)
            whole.append(rollout)
    if not whole:
        raise DataError(f"{path} holds no response that was not cut off: name a file of rollouts that end by themselves")
    prompts = [
        Prompt(
            *(r.prompt_id, r.prompt, r.prompt_token_ids, r.answer, r.response_token_ids, r.domain),
            teacher_prompts=r.teacher_prompts,
        )
        for r in whole
    ]
    return prompts, len(rollouts) - len(whole)
