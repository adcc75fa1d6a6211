"""Mathematical equality of two answers, by math-verify. For worker processes only: it may take any time or memory."""

from __future__ import annotations

from math_verify import LatexExtractionConfig, parse, verify

_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_PERCENT_SIGNS = ("\\%", "%", "percent")


def equivalent(reference: str, answer: str) -> bool:
    r"""Whether `answer` equals `reference` as mathematics; both are the content of a `\boxed{}`.

    math-verify's own time limits (SIGALRM) are off: the parent process kills a worker that takes too long.
    """
    return verify(_parse(reference), _parse(answer), timeout_seconds=None)


def _parse(text: str) -> list[object]:
    """math-verify's reading of one answer.

    A percent sign is moved behind the closing dollars, the only place where math-verify reads `50\\%` as a percentage. Plain
    text extraction is off: it would take a number out of the middle of a sentence.
    """
    text = text.strip().rstrip(".").rstrip()
    for sign in _PERCENT_SIGNS:
        if text.endswith(sign):
            return parse(f"$${text.removesuffix(sign).rstrip()}$$%", _LATEX, parsing_timeout=None)
    return parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None)
