"""Whether a verifier can find any response equal to the reference answers of data."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_mcore.errors import DataError
from kdrl_mcore.reward import models, python_code, rules  # noqa: F401 (they register the built-in rewards)
from kdrl_mcore.reward.registry import reward_class
from kdrl_mcore.types import Prompt

SHOWN_CHARS = 80
"""Of an answer in an error's line."""


def check_answers(answers: Sequence[str], source: str, kind: str) -> None:
    """Check that the verifier `kind` can find a response equal to each answer; needs no worker and takes microseconds each.

    Raises:
        DataError: it cannot, naming the row (from 1), the answer and why.
        ConfigError: there is no such reward.
    """
    verifier = reward_class(kind)
    if verifier is None:
        return
    for row, answer in enumerate(answers, start=1):
        if reason := verifier.why_refused(answer):
            shown = answer if len(answer) <= SHOWN_CHARS else f"{answer[:SHOWN_CHARS]}..."
            raise DataError(f"{source} row {row}: no response can match the answer {shown!r} with reward={kind}: {reason}")


def check_golds(prompts: Sequence[Prompt], source: str, kind: str) -> None:
    """`check_answers` of a loaded data set."""
    check_answers([prompt.answer for prompt in prompts], source, kind)
