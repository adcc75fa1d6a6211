r"""Plain numbers as exact fractions: integers, decimals, e-notation, fractions, mixed numbers, repeating decimals, percentages.

A number has exactly the value that is written: nothing is rounded. Two numbers are equal only if their values are, with one
exception: a decimal with at least six digits after the point equals every number that it could be truncated or rounded from
(`agree`): 0.333333 is a third, and 0.33 is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

MAX_EXPONENT = 2000
"""The largest exponent of a power of ten; a text with a larger one is not a plain number."""
PRECISE_DIGITS = 6
"""A decimal with at least this many significant digits after the point equals what it was truncated or rounded from."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_TIMES_TEN = (
    r"(?:[eE](?:\{\s*)?([+-]?\d+)(?:\s*\})?|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\s*\d+)\s*\}|([+-]?\d+)))"
)
_NUMBER = re.compile(rf"({_DECIMAL}){_TIMES_TEN}?")
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?\s*\d+)\s*\}|([+-]?\d+))")
_SLASH = re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})")
_FRAC = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BRACED_SLASH = re.compile(r"\{([^{}]*)\}\s*/\s*\{([^{}]*)\}")
_MIXED = re.compile(r"(\d+)(?:\s*(\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})|\s+(?:and\s+)?(\d+\s*/\s*\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*?)(?:\\overline\s*\{?\s*(\d+)\s*\}?|\\dot\s*\{?\s*(\d)\s*\}?|\((\d+)\))(?:\s*\\ldots)?")
_GOES_ON = re.compile(r"(\d*)\.(\d*?)(\d+?)\3{2,}\s*\\ldots")
_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen".split()
    )
} | {word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)}


@dataclass(frozen=True)
class Number:
    """An exact value. `place` is the place value of the last digit of a decimal with `PRECISE_DIGITS`, else 0."""

    value: Fraction
    place: Fraction = Fraction(0)
    percent: bool = False


def read_number(text: str) -> Number | None:
    """The number that a normalised text is as a whole; None if it is not one."""
    text = text.strip()
    if text.endswith("%"):
        number = read_number(text[:-1])
        return None if number is None or number.percent else replace(number, percent=True)
    if text.endswith("^\\circ"):
        text = text.removesuffix("^\\circ").rstrip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:].lstrip() if text[:1] in ("-", "+") else text
    number = _unsigned(text)
    return None if number is None else replace(number, value=sign * number.value)


def _unsigned(text: str) -> Number | None:
    if match := _NUMBER.fullmatch(text):
        return _decimal(match[1], match[2] or match[3] or match[4])
    if match := _POWER_OF_TEN.fullmatch(text):
        return _decimal("1", match[1] or match[2])
    if match := _SLASH.fullmatch(text) or _BRACED_SLASH.fullmatch(text) or _FRAC.fullmatch(text):
        return _fraction(match[1], match[2])
    if match := _MIXED.fullmatch(text):
        part = _unsigned(match[2] or match[3])
        return Number(int(match[1]) + part.value) if part is not None and part.value < 1 else None
    if match := _REPEATING.fullmatch(text):
        return Number(_repeating(match[1], match[2], match[3] or match[4] or match[5]))
    if match := _GOES_ON.fullmatch(text):
        return Number(_repeating(match[1], match[2], match[3]))
    return None


def _decimal(digits: str, exponent: str | None) -> Number | None:
    power = int((exponent or "0").replace(" ", ""))
    if abs(power) > MAX_EXPONENT:
        return None
    whole, _, decimals = digits.replace(",", "").replace(" ", "").partition(".")
    scale = Fraction(10) ** (power - len(decimals))
    significant = len((whole + decimals).lstrip("0"))
    counted = significant if exponent else min(significant, len(decimals))  # in e-notation every digit counts as a decimal
    precise = bool(decimals) and counted >= PRECISE_DIGITS
    return Number(int(whole + decimals or "0") * scale, scale if precise else Fraction(0))


def _fraction(above: str, below: str) -> Number | None:
    numerator, denominator = read_number(above), read_number(below)
    if numerator is None or denominator is None or not denominator.value or numerator.percent or denominator.percent:
        return None
    return Number(numerator.value / denominator.value)


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    head = int((whole + fixed) or "0")
    return (head + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(fixed)


def agree(first: Number, second: Number) -> bool:
    """Whether two numbers are equal. A percentage also equals the bare number before its sign (50% equals 0.5 and 50)."""
    if first.percent == second.percent:
        return _equal(first, second)
    percentage, other = (first, second) if first.percent else (second, first)
    as_fraction = replace(percentage, value=percentage.value / 100, place=percentage.place / 100)
    return _equal(percentage, other) or _equal(as_fraction, other)


def _equal(first: Number, second: Number) -> bool:
    # The coarser of two decimals decides; integers and fractions have no place and are exact.
    return first.value == second.value or abs(first.value - second.value) < max(first.place, second.place)


def spelled(words: tuple[str, ...]) -> int | None:
    """The value of a number in words, up to ninety-nine (`zero`, `twenty five`); None for other words."""
    values = [_WORDS.get(word) for word in words]
    match values:
        case [int(value)]:
            return value
        case [int(tens), int(ones)] if tens >= 20 and 0 < ones < 10:
            return tens + ones
    return None
