"""Rewards that a rule decides at once: exact match, choice, format; and mathematical equality, by worker processes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.reward.answers import compare_plainly, count_boxes, last_boxed
from kdrl_mcore.reward.pool import WorkerPool
from kdrl_mcore.reward.registry import AnswerReward, register_class, register_function
from kdrl_mcore.types import Rollout

MATH_VERIFY = "kdrl_mcore.reward.equivalence:equivalent"
"""What the workers run for `math_verify`."""

_BARE_CHOICE = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]|$)")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_STATED_CHOICE = re.compile(r"\b[Aa]nswer(?:\s+is\s*:?|\s*:)\s*[(\[*$]*([A-Z])\b")


@register_class("math_verify")
class MathVerify(AnswerReward):
    r"""Equal as mathematics: the content of the response's last `\boxed{}` and the reference.

    Plain integers and identical strings are compared at once (`compare_plainly`); everything else goes to worker processes
    that are killed when they take too long, and such an answer is wrong and counted.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Starts nothing: workers start with the first answer that needs one."""
        self._pool = WorkerPool(MATH_VERIFY, config.workers, config.timeout)

    @property
    def timeouts(self) -> int:  # type: ignore[override]
        """See `Reward`."""
        return self._pool.timeouts

    @property
    def crashes(self) -> int:  # type: ignore[override]
        """See `Reward`."""
        return self._pool.crashes

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`."""
        return last_boxed(rollout.response)

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


class _TextAnswer(AnswerReward):
    """Answers that are equal where their texts are, after `_normal`."""

    def __init__(self, config: RewardConfig) -> None:
        """Needs none of the settings."""

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """See `AnswerReward`."""
        return [self._normal(reference) == self._normal(answer) for reference, answer in pairs]

    @staticmethod
    def _normal(text: str) -> str:
        """Runs of white space count as one space."""
        return " ".join(text.split())


@register_class("exact_match")
class ExactMatch(_TextAnswer):
    r"""The same text: the content of the last `\boxed{}`, or the whole response where it opens no box, and the reference."""

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`. A box that is not closed holds nothing."""
        return last_boxed(rollout.response) if count_boxes(rollout.response) else self._normal(rollout.response)


@register_class("multiple_choice")
class MultipleChoice(_TextAnswer):
    r"""The same letter. The response's is in its last `\boxed{}`, or behind its last "answer is" where it opens no box."""

    def answer(self, rollout: Rollout) -> str | None:
        """See `AnswerReward`."""
        if count_boxes(rollout.response):
            return _choice(last_boxed(rollout.response) or "")
        stated = _STATED_CHOICE.findall(rollout.response)
        return stated[-1].upper() if stated else None

    @staticmethod
    def _normal(text: str) -> str:
        return _choice(text) or text


def _choice(text: str) -> str | None:
    r"""The letter of a choice such as `B`, `(b)`, `\text{B}` or `B. because ...`; None where it is none."""
    match = _BARE_CHOICE.match(_LATEX_TEXT.sub(r"\1", text).strip())
    return match[1].upper() if match else None


@register_function("format")
def well_formed(rollout: Rollout) -> float:
    r"""1 where the response ended by itself and holds exactly one `\boxed{}`."""
    one_box = count_boxes(rollout.response) == 1 and last_boxed(rollout.response) is not None
    return float(rollout.finish_reason == "stop" and one_box)
