"""Check that a verifier can accept a response for each reference answer of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.reward import models, python_code, rules  # noqa: F401 (they register the built-in rewards)
from kdrl_mcore.reward.registry import AnswerReward, build_reward, needed_columns, reward_class
from kdrl_mcore.types import Rollout

SHOWN_CHARS = 80
"""The most characters of an answer that an error message shows."""
MOST_CHECKED = 20_000
"""The most answers of one data set that are checked when a run starts, evenly spread over a larger set."""


class Answers(Protocol):
    """Prompts with reference answers."""

    def __len__(self) -> int:
        """The number of prompts."""
        ...

    def answers(self) -> Iterable[tuple[int, str]]:
        """The row and the answer of each prompt."""
        ...


def check_answers(
    answers: Sequence[str], source: str, kind: str, config: RewardConfig | None = None, rows: Sequence[int] | None = None
) -> None:
    """Check for each answer that the verifier `kind` accepts a response that states it, which takes tens of microseconds each.
    A verifier that does not compare answers (programs, reward models) only has to be able to use it; functions are not checked.

    Args:
        rows: the row of each answer; by default they count from 1.

    Raises:
        DataError: an answer cannot be matched; the message names its row, the answer and the reason.
        ConfigError: there is no such reward.
    """
    verifier = reward_class(kind)
    if verifier is None:
        return
    rows = range(1, len(answers) + 1) if rows is None else rows
    reasons = [verifier.why_refused(answer) for answer in answers]
    if issubclass(verifier, AnswerReward) and not any(reasons):
        reasons = _not_their_own(verifier, answers, replace(config or RewardConfig(), kind=kind))
    refused = [each for each in zip(rows, answers, reasons, strict=True) if each[2]]
    if refused:
        (row, answer, reason), others = refused[0], len(refused) - 1
        shown = answer if len(answer) <= SHOWN_CHARS else f"{answer[:SHOWN_CHARS]}..."
        more = f" (and {others} more of {len(answers)}, the last in row {refused[-1][0]})" if others else ""
        raise DataError(f"{source} row {row}: no response can match the answer {shown!r} with reward={kind}: {reason}{more}")


def _not_their_own(verifier: type[AnswerReward], answers: Sequence[str], config: RewardConfig) -> list[str | None]:
    """The reason to refuse each answer that the verifier does not accept from a response that states it; None for the rest."""
    stated = [[_response(answer, text) for text in verifier.statements(answer)] for answer in answers]
    judge = build_reward(config.kind, config)
    try:
        scores = iter(judge.score([response for responses in stated for response in responses]))
    finally:
        judge.close()
    verdicts = [[next(scores) for _ in responses] for responses in stated]
    return ["its own verifier does not find it equal to itself" if each and not any(each) else None for each in verdicts]


def check_golds(
    prompts: Answers, source: str, kind: str, config: RewardConfig | None = None, *, everything: bool = False
) -> None:
    """`check_answers` for a loaded data set, for at most `MOST_CHECKED` prompts unless `everything` is to be checked."""
    rows, answers = [], []
    count = len(prompts)
    chosen = None if everything or count <= MOST_CHECKED else set(np.linspace(0, count - 1, MOST_CHECKED, dtype=int).tolist())
    for index, (row, answer) in enumerate(prompts.answers()):
        if chosen is None or index in chosen:
            rows.append(row)
            answers.append(answer)
    check_answers(answers, source, kind, config, rows)


def check_columns(kind: str, columns: Sequence[str], source: str) -> None:
    """Check that the columns that a reward needs are among those that are read from `source`.

    Raises:
        ConfigError: one is missing, or there is no such reward.
    """
    for name in needed_columns(kind):
        if name not in {column.replace(".", "_") for column in columns}:
            raise ConfigError(f"the reward {kind} needs the column '{name}' of {source}: list it in data.columns")


def _response(answer: str, stated: str) -> Rollout:
    nothing = np.empty(0, dtype=np.int64)
    log_probs = np.empty(0, dtype=np.float32)
    return Rollout("", 0, nothing, nothing, log_probs, "stop", 0, response=stated, answer=answer)
