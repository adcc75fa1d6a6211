"""Rule-based rewards: exact match, multiple choice and format, and mathematical equality, which worker processes decide."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.reward.answers import (
    MAX_ANSWER_CHARS,
    boxed_answer,
    compare_plainly,
    count_boxes,
    final_part,
    free_answer,
    last_boxed,
    reference_answer,
)
from kdrl_mcore.reward.choices import choice_of, chosen
from kdrl_mcore.reward.notation import normalise
from kdrl_mcore.reward.pool import WorkerPool
from kdrl_mcore.reward.registry import AnswerReward, register_class, register_function
from kdrl_mcore.reward.verdicts import TIMEOUT, Unjudged
from kdrl_mcore.types import Rollout

MATH_VERIFY = "kdrl_mcore.reward.equivalence:equivalent"
ANYWHERE = "kdrl_mcore.reward.extraction:equivalent_anywhere"
"""The functions that the workers run for `math_verify`, depending on `reward.extract`."""

TRIED_FIRST = 8
"""The number of answers compared with a reference before it is dropped, if none of these comparisons worked."""

MAX_WORDS = 20
"""A reference with more words is a text, not an answer."""

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")


@register_class("math_verify")
class MathVerify(AnswerReward):
    r"""1 if the response's boxed answer (`boxed_answer`) and the reference are mathematically equal. With
    `reward.extract=anywhere` the answer may also be stated without a box.

    Plain integers and identical strings are compared directly (`compare_plainly`). Everything else goes to worker processes,
    which are killed if they take too long; such an answer counts as wrong and as a time-out.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Take the settings; workers start with the first answer that needs one."""
        self._anywhere = config.extract == "anywhere"
        self.undecided: set[tuple[str, str]] = set()
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
        """See `Reward`. A whole solution is refused: a response would have to repeat it word for word."""
        reference = reference_answer(answer)
        if not reference:
            return "it is empty"
        if boxed_answer(f"\\boxed{{{reference}}}") is None:
            return f"its braces are not balanced, or it has more than {MAX_ANSWER_CHARS} characters"
        if len(_WORD.findall(_COMMAND.sub(" ", reference))) > MAX_WORDS:
            return "it is a text rather than an answer; write only the answer, or put it in \\boxed{} or after ####"
        return None

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`."""
        return free_answer(rollout.response) if self._anywhere else boxed_answer(rollout.response)

    def spelling(self, answer: str) -> str:
        """See `AnswerReward`. With `reward.extract=anywhere` the text stays unchanged."""
        return answer if self._anywhere else normalise(answer) or answer

    def equal(self, pairs: Sequence[tuple[str, str]]) -> Sequence[bool | Unjudged]:
        """See `AnswerReward`."""
        plain = [compare_plainly(*pair) for pair in pairs]
        verdicts = self._compare([pair for pair, verdict in zip(pairs, plain, strict=True) if verdict is None])
        return [verdicts[pair] if verdict is None else verdict for pair, verdict in zip(pairs, plain, strict=True)]

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool | Unjudged]:
        """The verdicts of the workers. If none of the first few answers could be compared with a reference, it is compared with
        "0": if that fails too, the reference is at fault, and its remaining pairs are not compared."""
        self.undecided = set()
        first, rest, seen = list[tuple[str, str]](), list[tuple[str, str]](), Counter[str]()
        for pair in dict.fromkeys(pairs):
            (first if seen[pair[0]] < TRIED_FIRST else rest).append(pair)
            seen[pair[0]] += 1
        verdicts = self._ask(first)
        if rest:
            references = {reference for reference, _ in rest} - {pair[0] for pair in first if pair not in self.undecided}
            self._ask([(reference, "0") for reference in sorted(references)])
            hopeless = {pair for pair in rest if (pair[0], "0") in self.undecided}
            verdicts |= self._ask([pair for pair in rest if pair not in hopeless]) | dict.fromkeys(hopeless, TIMEOUT)
            self.undecided |= hopeless
        return verdicts

    def _ask(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool | Unjudged]:
        verdicts = dict(zip(pairs, self._pool.compare(pairs), strict=True))
        self.undecided |= self._pool.undecided
        return verdicts

    @classmethod
    def statements(cls, answer: str) -> tuple[str, ...]:
        """See `AnswerReward`."""
        return (f"\\boxed{{{reference_answer(answer)}}}",)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


@register_class("exact_match")
class ExactMatch(AnswerReward):
    r"""1 if the content of the last `\boxed{}`, or the response (without its thought) if it opens no box, is the same text as
    the reference.

    Dollar signs around either text are ignored, runs of white space count as one space, and accented letters are equal in
    every Unicode composition.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Uses none of the settings."""

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`. A box that is not closed has no content. A box in a thought counts only if nothing is boxed after
        the thought, and nothing in a thought that does not end."""
        part = final_part(rollout.response)
        if count_boxes(part):
            return last_boxed(part)
        return boxed_answer(rollout.response) or reference_answer(part)

    @classmethod
    def statements(cls, answer: str) -> tuple[str, ...]:
        """See `AnswerReward`."""
        return (f"\\boxed{{{reference_answer(answer)}}}", reference_answer(answer))

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """See `AnswerReward`."""
        return [_one_spelling(reference) == _one_spelling(answer) for reference, answer in pairs]


def _one_spelling(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


@register_class("multiple_choice")
class MultipleChoice(AnswerReward):
    r"""1 if `choice_of` finds the same letter or letters (`A, C`) in the response as `chosen` in the reference."""

    def __init__(self, config: RewardConfig) -> None:
        """Uses none of the settings."""

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """See `Reward`. An index is refused, as some data sets count from 0 and others from 1."""
        found = chosen(reference_answer(answer))
        return None if found else "it names no choice; write its letter, such as B, (B) or A, C"

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`."""
        return choice_of(rollout.response)

    @classmethod
    def statements(cls, answer: str) -> tuple[str, ...]:
        """See `AnswerReward`."""
        return (f"\\boxed{{{reference_answer(answer)}}}",)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """See `AnswerReward`. A reference that is not a choice equals no answer."""
        return [chosen(reference) == chosen(answer) is not None for reference, answer in pairs]


@register_function("format")
def well_formed(rollout: Rollout) -> float:
    r"""1 if the response ended by itself and has exactly one `\boxed{}`, else 0."""
    one_box = count_boxes(rollout.response) == 1 and last_boxed(rollout.response) is not None
    return float(rollout.finish_reason == "stop" and one_box)
