r"""Answers outside a box, for `reward.extract=anywhere`: math-verify finds them in the text. For worker processes only."""

from __future__ import annotations

import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from kdrl_mcore.reward.answers import last_boxed
from kdrl_mcore.reward.equivalence import equivalent
from kdrl_mcore.reward.notation import normalise
from kdrl_mcore.reward.numbers import agree, read_number

_WHEREVER = (LatexExtractionConfig(), ExprExtractionConfig())
_FORMULA = re.compile(r"\$|\\\(|\\\[")


def equivalent_anywhere(reference: str, answer: str) -> bool:
    r"""Whether an answer, given as `\boxed{...}` or as a text that states it, equals the reference.

    A boxed answer is compared by `equivalent`. In a text math-verify looks for the answer (after "the answer is", else the
    last formula or number) and compares it, except that two plain numbers are compared exactly, as everywhere.
    """
    expected = _bare(reference)
    if answer.startswith("\\boxed{") and equivalent(expected, _bare(answer)):
        return True
    gold, found = _find(reference if _FORMULA.search(reference) else f"${reference}$"), _find(answer)
    if not gold or not found:
        return False
    stated = str(found[-1])
    numbers = read_number(normalise(expected)), read_number(normalise(stated))
    if numbers[0] is not None and numbers[1] is not None:
        return agree(numbers[0], numbers[1])
    return equivalent(expected, stated) or bool(verify(gold, found, timeout_seconds=None))


def _bare(answer: str) -> str:
    boxed = last_boxed(answer)
    return boxed if boxed and answer.startswith("\\boxed{") else answer


def _find(text: str) -> list[Any]:
    return list(parse(text, _WHEREVER, parsing_timeout=None))
