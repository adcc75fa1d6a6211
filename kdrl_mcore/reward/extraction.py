r"""Answers outside a box, for `reward.extract=anywhere`: math-verify finds them in the text. For worker processes only."""

from __future__ import annotations

import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from kdrl_mcore.reward.answers import last_boxed
from kdrl_mcore.reward.equivalence import equivalent
from kdrl_mcore.reward.notation import normalise
from kdrl_mcore.reward.numbers import agree, read_number

MAX_WORDS = 4
"""The most words after "the answer is" that count as the answer without further search."""
_WHEREVER = (LatexExtractionConfig(), ExprExtractionConfig())
_FORMULA = re.compile(r"\$|\\\(|\\\[")
_SAYS = re.compile(r"\banswers?\b[*_]*(?:\s*:|\s+(?:is|are|would be|must be)\b\s*:?)[*_]*[ \t]*(?=[^\s:])", re.IGNORECASE)
_EXPLAINS = re.compile(r"\b(?:is|are|was|has|have|we|that|which|the|since|because|as)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?:\s.*)?$", re.DOTALL)


def equivalent_anywhere(reference: str, answer: str) -> bool:
    r"""Whether an answer, given as `\boxed{...}` or as a text that states it, equals the reference.

    A boxed answer is compared by `equivalent`, and so is what a text calls its answer in a few words. Else math-verify looks
    for the answer in the text (the last formula or number) and compares it in its own, more lenient way, except that two plain
    numbers are compared exactly, as everywhere.
    """
    expected = _bare(reference)
    if answer.startswith("\\boxed{"):
        return equivalent(expected, _bare(answer))
    said = _said(answer)
    if said and equivalent(expected, said):
        return True
    if said and len(said.split()) <= MAX_WORDS and not _EXPLAINS.search(said):
        return False
    gold, found = _find(reference if _FORMULA.search(reference) else f"${reference}$"), _find(answer)
    if not gold or not found:
        return False
    stated = str(found[-1])
    numbers = read_number(normalise(expected)), read_number(normalise(stated))
    if numbers[0] is not None and numbers[1] is not None:
        return agree(numbers[0], numbers[1])
    return equivalent(expected, stated) or bool(verify(gold, found, timeout_seconds=None))


def _said(text: str) -> str:
    """What follows the last "the answer is" in its sentence; empty without one."""
    says = [*_SAYS.finditer(text)]
    return _SENTENCE.sub("", text[says[-1].end() :].partition("\n")[0]) if says else ""


def _bare(answer: str) -> str:
    boxed = last_boxed(answer)
    return boxed if boxed and answer.startswith("\\boxed{") else answer


def _find(text: str) -> list[Any]:
    return list(parse(text, _WHEREVER, parsing_timeout=None))
