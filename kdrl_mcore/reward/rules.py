"""Rewards that a rule decides at once: exact match, choice, format; and mathematical equality, by worker processes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.reward.answers import (
    MAX_ANSWER_CHARS,
    boxed_answer,
    compare_plainly,
    count_boxes,
    free_answer,
    last_boxed,
    reference_answer,
)
from kdrl_mcore.reward.choices import choice_of, chosen
from kdrl_mcore.reward.pool import WorkerPool
from kdrl_mcore.reward.registry import AnswerReward, register_class, register_function
from kdrl_mcore.types import Rollout

MATH_VERIFY = "kdrl_mcore.reward.equivalence:equivalent"
ANYWHERE = "kdrl_mcore.reward.extraction:equivalent_anywhere"
"""What the workers run for `math_verify`, by `reward.extract`."""

MAX_WORDS = 20
"""A reference with more words is no answer but a text."""

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")


@register_class("math_verify")
class MathVerify(AnswerReward):
    r"""Equal as mathematics: the answer that the response boxes (`boxed_answer`) and the reference. With
    `reward.extract=anywhere` also an answer that is stated without a box.

    Plain integers and identical strings are compared at once (`compare_plainly`); everything else goes to worker processes
    that are killed when they take too long, and such an answer is wrong and counted.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Starts nothing: workers start with the first answer that needs one."""
        self._anywhere = config.extract == "anywhere"
        self._pool = WorkerPool(ANYWHERE if self._anywhere else MATH_VERIFY, config.workers, config.timeout)

    @property
    def timeouts(self) -> int:  # type: ignore[override]
        """See `Reward`."""
        return self._pool.timeouts

    @property
    def crashes(self) -> int:  # type: ignore[override]
        """See `Reward`."""
        return self._pool.crashes

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """See `Reward`. A whole solution is refused: what it says would have to be repeated word for word."""
        reference = reference_answer(answer)
        if not reference:
            return "it is empty"
        if boxed_answer(f"\\boxed{{{reference}}}") is None:
            return f"its braces are not balanced, or it has more than {MAX_ANSWER_CHARS} characters"
        if len(_WORD.findall(_COMMAND.sub(" ", reference))) > MAX_WORDS:
            return "it is a text rather than an answer; write the answer alone, in \\boxed{}, or behind ####"
        return None

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`."""
        return free_answer(rollout.response) if self._anywhere else boxed_answer(rollout.response)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """See `AnswerReward`."""
        verdicts = [compare_plainly(*pair) for pair in pairs]
        hard = [index for index, verdict in enumerate(verdicts) if verdict is None]
        for index, verdict in zip(hard, self._pool.compare([pairs[index] for index in hard]), strict=True):
            verdicts[index] = verdict
        return [bool(verdict) for verdict in verdicts]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


@register_class("exact_match")
class ExactMatch(AnswerReward):
    r"""The same text: the content of the last `\boxed{}`, or the whole response where it opens no box, and the reference.

    Dollar signs around the whole are no part of either; runs of white space count as one space, and letters with accents are
    the same however Unicode composes them.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Needs none of the settings."""

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`. A box that is not closed holds nothing."""
        return last_boxed(rollout.response) if count_boxes(rollout.response) else reference_answer(rollout.response)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """See `AnswerReward`."""
        return [_one_spelling(reference) == _one_spelling(answer) for reference, answer in pairs]


def _one_spelling(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


@register_class("multiple_choice")
class MultipleChoice(AnswerReward):
    r"""The same letter, or letters (`A, C`), as `choice_of` finds them in the response and `chosen` in the reference."""

    def __init__(self, config: RewardConfig) -> None:
        """Needs none of the settings."""

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """See `Reward`. An index is refused, as data sets begin at 0 or at 1."""
        found = chosen(reference_answer(answer))
        return None if found else "it names no choice; write its letter, such as B, (B) or A, C"

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`."""
        return choice_of(rollout.response)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """See `AnswerReward`. A reference that is no choice equals no answer."""
        return [chosen(reference) == chosen(answer) is not None for reference, answer in pairs]


@register_function("format")
def well_formed(rollout: Rollout) -> float:
    r"""1 where the response ended by itself and holds exactly one `\boxed{}`."""
    one_box = count_boxes(rollout.response) == 1 and last_boxed(rollout.response) is not None
    return float(rollout.finish_reason == "stop" and one_box)
