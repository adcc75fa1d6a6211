r"""Comparing formulas exactly with math-verify and sympy, and correcting their parsing and rounding errors. For workers only.

Two constants are equal if they agree to `DIGITS` significant digits, so that practically any difference counts. Formulas with
variables are equal if math-verify finds them equal and they have the same values at sample points.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from kdrl_mcore.reward.numbers import Number, agree, read_number

DIGITS = 60
"""The number of significant digits to which equal constants agree."""
_READING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
)  # words.py handles units: math-verify would take the m of 5m for one
_LATEX = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_READING)]
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_ANGLE_FUNCTION = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DMS = re.compile(r"(-?)(\d+)\s*\^\\circ\s*(?:(\d+(?:\.\d+)?)\s*(?:'|\^\{?\\prime\}?))?\s*(?:(\d+(?:\.\d+)?)\s*(?:''|\"|'))?")
_REPEATING = re.compile(r"\d*\.\d*\\overline\s*\{?\s*\d+\s*\}?")
_E_NOTATION = re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\d.A-Za-z])")
_LOOSE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_APART = re.compile(r"(?<![\d_^])\d+\s+\d")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:[, ]\d{3})+(?!\d|,\d)")


def equal_formulas(reference: str, answer: str) -> bool:
    """Whether two formulas without words are equal."""
    if _squeezed(reference) == _squeezed(answer):
        return True
    first, second = number(reference), number(answer)
    if first is not None and second is not None:
        return agree(first, second)
    left, right = expression(reference), expression(answer)
    if left is None or right is None:
        return False
    if _is_scalar(left) and _is_scalar(right):
        if not left.free_symbols and not right.free_symbols:
            return _equal_constants(left, right, first, second)
        if left.free_symbols != right.free_symbols and sympy.simplify(left - right) != 0:
            return False
        return _equal_at_points(left, right) and by_math_verify(reference, answer)
    return by_math_verify(reference, answer)


def near(formula: str, decimal: Number) -> bool | None:
    """Whether a decimal is the value of a constant formula, truncated or rounded to the decimal's last place; None if
    the formula is not a constant."""
    if (plain := number(formula)) is not None:
        return agree(plain, decimal)
    found = expression(formula)
    if found is None or not _is_scalar(found) or found.free_symbols:
        return None
    return _equal_constants(found, sympy.Rational(str(decimal.value)), None, decimal)


def by_math_verify(reference: str, answer: str) -> bool:
    """math-verify's verdict on two texts. Its time limits (SIGALRM) are off: the parent process kills slow workers."""
    return bool(verify(_parsed(reference), _parsed(answer), allow_set_relation_comp=True, timeout_seconds=None))


@lru_cache(maxsize=512)
def number(text: str) -> Number | None:
    """The plain number that a formula is; None if it is not one. Degrees, minutes and seconds become a number of degrees."""
    if (found := read_number(text)) is not None:
        return found
    if match := _DMS.fullmatch(text.strip()):
        degrees, minutes, seconds = (read_number(part or "0") for part in match.groups()[1:])
        if degrees and minutes and seconds:
            value = degrees.value + minutes.value / 60 + seconds.value / 3600
            return Number(-value if match[1] else value)
    return None


@lru_cache(maxsize=512)
def expression(text: str) -> Any | None:
    """The exact sympy expression of a formula: decimals are fractions, `i` and `e` the constants; None if it cannot be
    parsed."""
    if (plain := number(text)) is not None:
        value = sympy.Rational(plain.value.numerator, plain.value.denominator)
        return value / 100 if plain.percent else value
    parsed = [] if _APART.search(text) else _parsed(text)  # "1 2" is neither 12 nor a product
    if not parsed or isinstance(parsed[0], str):
        return None
    found = parsed[0]
    try:
        constants = {s: sympy.I for s in found.free_symbols if s.name == "i"}
        if re.search(r"(?<![A-Za-z\\])e(?![A-Za-z])", text):
            constants |= {s: sympy.E for s in found.free_symbols if s.name == "e"}
        found = found.xreplace({each: sympy.Rational(str(each)) for each in found.atoms(sympy.Float)})
        return found.xreplace(constants) if constants else found
    except (AttributeError, TypeError, ValueError):
        return found


@lru_cache(maxsize=512)
def _parsed(text: str) -> list[Any]:
    text = _E_NOTATION.sub(r"\1\\times 10^{\2}", text.strip())
    text = _GROUPED.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    text = _REPEATING.sub(_as_fraction, text)
    if _ANGLE_FUNCTION.search(text):
        text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    if text.endswith("%"):
        return parse(f"$${text[:-1].rstrip()}$$%", _LATEX, parsing_timeout=None)
    return parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None)


def _as_fraction(match: re.Match[str]) -> str:
    found = read_number(match[0])
    return match[0] if found is None else f"\\frac{{{found.value.numerator}}}{{{found.value.denominator}}}"


def _squeezed(text: str) -> str:
    """The text without white space, except between two digits, which it separates."""
    return _LOOSE_SPACE.sub("", text.strip())


def _is_scalar(found: Any) -> bool:
    return isinstance(found, sympy.Expr) and not isinstance(found, sympy.MatrixBase | sympy.MatrixExpr)


def _equal_constants(left: Any, right: Any, first: Number | None, second: Number | None) -> bool:
    if left == right:
        return True
    place = sympy.Rational(str(max((each.place for each in (first, second) if each is not None), default=0)))
    pairs = [(left, right)]
    pairs += [(left * 100, right)] * _is_percent(first) + [(left, right * 100)] * _is_percent(second)
    for one, other in pairs:
        one, other = one.doit(), other.doit()
        if one == other:
            return True
        if one.is_Rational and other.is_Rational:
            exact = abs(one - other) < place
        elif one.is_finite is False or other.is_finite is False:
            exact = False
        else:
            difference, size = sympy.N(one - other, DIGITS + 15), abs(sympy.N(one, DIGITS)) + abs(sympy.N(other, DIGITS))
            if not difference.is_number or not size.is_number or difference.has(sympy.nan, sympy.zoo):
                continue
            exact = bool(abs(difference) <= size / sympy.Integer(10) ** DIGITS or abs(difference) < place)
            exact = exact or bool(0 in (one, other) and sympy.simplify(one - other) == 0)
        if exact:
            return True
    return False


def _is_percent(plain: Number | None) -> bool:
    return plain is not None and plain.percent


def _equal_at_points(left: Any, right: Any) -> bool:
    """Whether two formulas agree at two values of their variables, as far as both are defined there."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    for start in (7, 23):
        point = {symbol: sympy.Rational(start + 6 * index, 11 + index) for index, symbol in enumerate(symbols)}
        one, other = (sympy.N(each.xreplace(point), DIGITS) for each in (left, right))
        has_values = one.is_number and other.is_number and one.is_finite and other.is_finite
        if has_values and abs(one - other) > (abs(one) + abs(other)) / 10**12:
            return False
    return True
