"""What leaks from a prompt that only the teacher reads into the student's text.

The teacher knows the answer, and its probabilities may teach the student to state it without deriving it, or to write as if it
had read a solution. Two signs of that are measured on the responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.types import Rollout, TokenIds

RUN = 8
"""The length of a run of tokens that two texts rarely have in common by chance."""


def leak_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The metrics of one step; empty if every teacher reads the student's prompts.

    `teacher_text_copied` is the share of response tokens in runs of at least `RUN` tokens that stand in what a teacher reads
    but not in the student's prompt. `answer_place` is where the reference answer first stands in the responses that contain it,
    as a share of their characters; a leaked answer moves it towards 0.
    """
    informed = [rollout for rollout in rollouts if rollout.teacher_prompts]
    if not informed:
        return {}
    copied = sum(copied_tokens(each).sum() for each in informed)
    metrics = {"teacher_text_copied": float(copied) / sum(len(each.response_token_ids) for each in informed)}
    places = [
        each.response.index(each.answer) / len(each.response)
        for each in informed
        if each.answer and each.answer in each.response
    ]
    return metrics | ({"answer_place": float(np.mean(places))} if places else {})


def copied_tokens(rollout: Rollout) -> NDArray[np.bool_]:
    """Which tokens of a response stand in such runs [response tokens]."""
    response = rollout.response_token_ids
    seen = {run for ids in rollout.teacher_prompts.values() for run in _runs(ids)} - set(_runs(rollout.prompt_token_ids))
    copied = np.zeros(len(response), dtype=np.bool_)
    for start, run in enumerate(_runs(response)):
        if run in seen:
            copied[start : start + RUN] = True
    return copied


def _runs(ids: TokenIds) -> list[bytes]:
    """Every run of `RUN` tokens, in order."""
    return [ids[start : start + RUN].tobytes() for start in range(len(ids) - RUN + 1)]
