"""What leaks from the teacher's prompt: copied text and early answers are measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kdrl_mcore.teacher.leak import NGRAM, leak_metrics
from kdrl_mcore.types import Rollout


def rollout(response: list[int], text: str, answer: str) -> Rollout:
    ids = np.array(response)
    prompts = {"teacher": np.array([1, 2, *range(100, 120)])}
    log_probs = np.zeros(len(ids), np.float32)
    return Rollout("p", 0, np.array([1, 2]), ids, log_probs, "stop", 0, response=text, answer=answer, teacher_prompts=prompts)


def test_copied_text_and_early_answers_are_measured() -> None:
    copies = rollout([5, *range(103, 103 + NGRAM + 1), 6], "so 42 it is", "42")
    short = rollout([*range(100, 100 + NGRAM - 1), 7, 8, 9], "none", "42")
    metrics = leak_metrics([copies, short])
    assert metrics == {"teacher_text_copied": (NGRAM + 1) / 21, "answer_place": 3 / 11}
    assert leak_metrics([replace(short, teacher_prompts={})]) == {}
