r"""Whether two answers are equal: they are normalised and compared by their structure, and formulas by math-verify.

For worker processes only: it may take any amount of time or memory. docs/rewards.md lists what counts as equal.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from kdrl_mcore.reward.algebra import near, number
from kdrl_mcore.reward.equal_forms import equal_forms
from kdrl_mcore.reward.forms import Form, readings, split
from kdrl_mcore.reward.notation import MARKS, TEXT_BEGIN, TEXT_END, normalise
from kdrl_mcore.reward.numbers import spelled
from kdrl_mcore.reward.words import Words, canonical

_APPROXIMATELY = re.compile(r"\\(?:approx|simeq)(?![A-Za-z])")
_VARIABLES = frozenset("mnpqrstxyz")
_LABEL = re.compile(rf"{TEXT_BEGIN}?\s*(?:\(([A-J])\)|\[([A-J])\]|([A-J])[.:)])\s*{TEXT_END}?\s*(.*)", re.DOTALL)
_BASE = re.compile(rf"\(?([0-9A-Za-z]+)\)?\s*(?:_\s*\{{?\s*{TEXT_BEGIN}?\s*(\w+)\s*{TEXT_END}?\s*\}}?|base (\d+))")
_FIGURE = re.compile(r"\\(?:triangle|overline|overrightarrow|overleftrightarrow|vec|angle)\s*\{?\s*([A-Z]{2,4})\s*\}?")
_JOINED = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_SAME_WORDS = {
    words: same
    for same, spellings in {
        ("\\emptyset",): (
            "no solution, no real solution, no real root, no such number, no such value, none exist, empty set, null set"
        ),
        ("does", "not", "exist"): "dne, doe not exist",
        ("-\\infty",): "negative infinity, minus infinity",
        ("\\infty",): "infinity, positive infinity, plus infinity",
    }.items()
    for words in (tuple(each.split()) for each in spellings.split(", "))
}
"""Words, as `canonical` writes them, that mean the same as other words or as a symbol."""


def equivalent(reference: str, answer: str) -> bool:
    r"""Whether `answer` equals `reference` mathematically; each is the content of a `\boxed{}`."""
    first, second = _worded(normalise(reference)), _worded(normalise(answer))
    if not first or not second:
        return False
    first, second = _figures(first, second)
    if (words := _letters(first)) and (others := _letters(second)):
        same = words == others or (sorted(words) == sorted(others) and _is_product(words))
        return same or _sentence(first) == _sentence(second) != ()
    if (labels := _labels(first, second)) is not None:
        return labels
    if (based := _bases(first, second)) is not None:
        return based
    return any(equal_forms(one, other) for one in _read(first) for other in _read(second, is_answer=True))


def _worded(text: str) -> str:
    """The text, or the symbol that it puts into words."""
    words = _sentence(text)
    return " ".join(_SAME_WORDS[words]) if words in _SAME_WORDS else text


def _sentence(text: str) -> Words:
    """The words of a text that consists of words, without articles; empty for single letters and formulas."""
    plain = MARKS.sub(" ", text)
    return canonical(plain) if _letters(text) and re.search("[^\\W\\d_]{3}", plain) else ()


def _figures(first: str, second: str) -> tuple[str, str]:
    r"""Both texts, without `\triangle`, `\overline` and the like before the name of a figure that only one of them has."""
    names = [_FIGURE.fullmatch(text) for text in (first, second)]
    if all(names) or not any(names):
        return first, second
    bare = [name[1] if name else text for name, text in zip(names, (first, second), strict=True)]
    return bare[0], bare[1]


@lru_cache(maxsize=512)
def _read(text: str, *, is_answer: bool = False) -> tuple[Form, ...]:
    """Every reading of a text; for `\\frac{1}{3} \\approx 0.33` those of both sides, if the decimal is the truncated or rounded
    value. An answer whose decimal is not that value is false, and has no reading."""
    exact, *rounded = (side.strip() for side in split(text, _APPROXIMATELY))
    if not rounded:
        return tuple(readings(text))
    sides = [exact] if exact else rounded[:1]
    value, decimal = (number(rounded[-1]), re.fullmatch(r"-?\d*\.(\d+)", rounded[-1]))
    if exact and value is not None and decimal:
        close = replace(value, place=Fraction(1, 10 ** len(decimal[1])))
        is_near = near(exact, close)
        if is_near is None:
            return tuple(readings(exact))
        sides = [exact, rounded[-1]] if is_near else [exact] * (not is_answer)
    return tuple(form for side in sides for form in readings(side))


def _letters(text: str) -> str:
    """The text in lower case without spaces if it consists of letters, at least two: a word, not a product. Else empty."""
    plain = MARKS.sub("", text)
    return plain.lower() if len(plain) > 1 and plain.isalpha() and not _JOINED.search(text) else ""


def _is_product(letters: str) -> bool:
    """Whether letters are more likely a product, whose order does not matter: two or three different common variables."""
    return len(letters) <= 3 and len(set(letters)) == len(letters) and _VARIABLES.issuperset(letters)


def _labels(reference: str, answer: str) -> bool | None:
    """The verdict if one of the answers is a labelled choice, such as `(C) 17` or `C.`; None if neither is."""
    (letter, rest), (other, other_rest) = _choice(reference), _choice(answer)
    if other and other_rest and not letter and equivalent(reference, other_rest):  # the reference is the content of the choice
        return True
    if not (letter and other) and not (rest and letter and other_rest) and not (other and other_rest and rest):
        return None
    if letter and other:
        return letter == other and (not rest or not other_rest or rest == other_rest or equivalent(rest, other_rest))
    if letter and rest and other_rest:  # the reference is labelled, the answer gives its content
        return equivalent(rest, other_rest)
    return None


def _choice(text: str) -> tuple[str, str]:
    """The letter of a choice and the text after it; an empty letter and the whole text if it is not a choice."""
    plain = text.replace(TEXT_BEGIN, "").replace(TEXT_END, "").strip()
    if bare := re.fullmatch(r"(?:(?i:option|choice|answer)\s*:?\s*)?([A-J])", plain):
        return bare[1], ""
    match = _LABEL.fullmatch(text)
    if match and not match[4].lstrip().startswith(("(", ",", "_", "^", "\\cup", "\\cap")):
        return match[1] or match[2] or match[3], match[4].strip()
    return "", text


def _bases(reference: str, answer: str) -> bool | None:
    """The verdict if one of two numbers names its base; the other may omit the base, but not name a different one."""
    first, second = _BASE.fullmatch(reference), _BASE.fullmatch(answer)
    if not first and not second:
        return None
    (digits, base), (others, other_base) = _digits(reference, first), _digits(answer, second)
    if digits is None or others is None:
        return None
    return digits == others and (base == other_base or 0 in (base, other_base))


def _digits(text: str, match: re.Match[str] | None) -> tuple[str | None, int]:
    """Digits without leading zeros, and the base: 0 if none is named. None instead of digits if it is not such a number."""
    if match is None:
        plain = text.replace(" ", "").strip("()")
        return (plain.upper().lstrip("0") or "0", 0) if re.fullmatch(r"[0-9][0-9A-Fa-f]*", plain) else (None, 0)
    name = match[2] or match[3]
    base = int(name) if name.isdigit() else spelled((name.lower(),)) or 0
    digits = match[1].upper()
    if not 0 < base <= 36 or (not digits[0].isdigit() and base <= 10):
        return None, 0
    return digits.lstrip("0") or "0", base
