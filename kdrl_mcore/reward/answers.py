"""Finding the answer in a text, and the comparisons that need no algebra: pure functions, linear in the text's length."""

from __future__ import annotations

import re

MAX_ANSWER_CHARS = 2000
"""A boxed answer longer than this is no answer: it bounds what reaches the parser, whatever the response holds."""

_BOX = re.compile(r"\\boxed\s*\{")
_INTEGER = re.compile(r"-?[0-9]{1,15}")


def count_boxes(text: str) -> int:
    r"""How many `\boxed{` the text opens."""
    return len(_BOX.findall(text))


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of the text holds, stripped.

    Braces are balanced; an escaped brace (`\{`) is content. None if there is no box, or if the last one is not closed
    within `MAX_ANSWER_CHARS` characters: an earlier box never stands in for it.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, position, end = 1, start, min(len(text), start + MAX_ANSWER_CHARS + 1)
    while position < end:
        character = text[position]
        if character == "\\":
            position += 1  # the next character is escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None


def reference_answer(answer: str) -> str:
    r"""The bare reference answer: out of its `\boxed{}` or its dollar signs where it has them, stripped."""
    boxed = last_boxed(answer)
    text = answer.strip() if boxed is None else boxed
    inner = text.strip("$")
    return inner.strip() if text.startswith("$") and text.endswith("$") and "$" not in inner else text


def compare_plainly(reference: str, answer: str) -> bool | None:
    """Whether two answers are equal, where that needs no parser; None where it does.

    Two cases are decided here. Equal strings are equal answers under every reading of them. Two plain integers (an
    optional minus and at most 15 digits) are equal exactly if their values are: integers have one value each, math-verify reads
    them as those values, and 15 digits are within the precision it compares at, so the verdict is the one it would give.
    Unequal decimals are not decided here, as math-verify compares them after rounding.
    """
    if reference == answer:
        return True
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return int(reference) == int(answer)
    return None
