"""Measures of how much of a prompt that only the teacher reads leaks into the student's responses.

A teacher that knows the answer may teach the student to state it without deriving it, or to write as if it had read a solution.
Two metrics of the responses show this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.types import Rollout, TokenIds

NGRAM = 8
"""The length of an n-gram of tokens that two texts rarely share by chance."""


def leak_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The metrics of one step; empty if every teacher reads the student's prompts.

    `teacher_text_copied` is the share of response tokens in n-grams (of `NGRAM` tokens) that occur in a teacher's prompt but
    not in the student's. `answer_place` is the position at which the reference answer first occurs in the responses that
    contain it, as a share of their characters; a leaked answer moves it towards 0.
    """
    informed = [rollout for rollout in rollouts if rollout.teacher_prompts]
    if not informed:
        return {}
    copied = sum(copied_tokens(each).sum() for each in informed)
    metrics = {"teacher_text_copied": float(copied) / sum(len(each.response_token_ids) for each in informed)}
    positions = [
        each.response.index(each.answer) / len(each.response)
        for each in informed
        if each.answer and each.answer in each.response
    ]
    return metrics | ({"answer_place": float(np.mean(positions))} if positions else {})


def copied_tokens(rollout: Rollout) -> NDArray[np.bool_]:
    """Which tokens of a response are in such n-grams [response tokens]."""
    response = rollout.response_token_ids
    prompts = rollout.teacher_prompts.values()
    seen = {ngram for ids in prompts for ngram in _ngrams(ids)} - set(_ngrams(rollout.prompt_token_ids))
    copied = np.zeros(len(response), dtype=np.bool_)
    for start, ngram in enumerate(_ngrams(response)):
        if ngram in seen:
            copied[start : start + NGRAM] = True
    return copied


def _ngrams(ids: TokenIds) -> list[bytes]:
    """Every n-gram of `NGRAM` tokens, in order."""
    return [ids[start : start + NGRAM].tobytes() for start in range(len(ids) - NGRAM + 1)]
