r"""Sets of real numbers (intervals, inequalities in one variable, unions, set builders) as sympy sets. For workers only."""

from __future__ import annotations

import re
from typing import Any

import sympy

from kdrl_mcore.reward.algebra import expression
from kdrl_mcore.reward.forms import Form, Items, Relation, Value, encloses, nesting, read, split
from kdrl_mcore.reward.notation import unwrap

Region = tuple[str | None, Any]
"""The variable, if one is named, and the set."""

_ORDER = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|[<>]")
_MEMBER = re.compile(r"\\in(?![A-Za-z])")
_UNION, _CUT = re.compile(r"\\cup(?![A-Za-z])"), re.compile(r"\\cap(?![A-Za-z])")
_WITHOUT = re.compile(r"\\(?:setminus|backslash)(?![A-Za-z])|(?<=\})\s*-\s*(?=\\\{)")
_NAME = re.compile(r"\\?[A-Za-z]+(?:'|_\{?\w+\}?)?(?:\([a-z]\))?")
_ABSOLUTE = re.compile(r"\|\s*([A-Za-z])\s*\|")
_ALL = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals, "C": sympy.S.Complexes}
_SETS = {
    words: found
    for found, spellings in {
        sympy.S.Reals: "all real number, all real, real number",
        sympy.S.Integers: "all integer, integer, every integer",
        sympy.S.Naturals: "all positive integer, positive integer, all natural number, natural number",
        sympy.S.Naturals0: "all nonnegative integer, all non-negative integer",
        sympy.S.Rationals: "all rational number, rational number",
    }.items()
    for words in (tuple(each.replace("-", " ").split()) for each in spellings.split(", "))
}
_BLACKBOARD = re.compile(r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?(\^\{?[+*]\}?)?")


def region_of(form: Form, like: Form | None = None) -> Region | None:
    """The set that an answer describes; None if it describes none. A bare list is a set only if compared with another
    description of one, `like`: `1, 2` with `x \\in \\{1, 2\\}`."""
    if isinstance(form, Relation):
        return _region(form.text)
    if isinstance(form, Items):
        found = _items(form)
        if found is None and not form.opening and isinstance(like, Relation):
            points = [_end(item) for item in form.items]
            return None if None in points else (None, sympy.FiniteSet(*points))
        return found
    if isinstance(form, Value):
        if not form.formula:
            return (None, _SETS[form.after]) if form.after in _SETS else None
        if (
            form.before[-1:] == ("except",)
            and form.before[:-1] in _SETS
            and (point := _end(Value(form.text, form.formula))) is not None
        ):
            return None, sympy.Complement(_SETS[form.before[:-1]], sympy.FiniteSet(point))
    return None


def equal_regions(first: Region, second: Region) -> bool:
    """Whether two sets are equal; if both name a variable, it must be the same."""
    (name, one), (other_name, other) = first, second
    if name and other_name and name != other_name:
        return False
    return bool(one == other or sympy.SymmetricDifference(one, other) == sympy.S.EmptySet)


def _items(form: Items) -> Region | None:
    if form.opening in ("(", "[") and len(form.items) == 2:
        low, high = map(_end, form.items)
        return _interval(low, high, form.opening == "(", form.closing == ")")
    if form.opening == "\\{":
        points = [_end(item) for item in form.items]
        return None if None in points else (None, sympy.FiniteSet(*points))
    parts = [region_of(item) for item in form.items]
    if form.opening or any(
        part is None or not isinstance(item, Relation) for part, item in zip(parts, form.items, strict=True)
    ):
        return None
    known = [part for part in parts if part is not None]
    names = {name for name, _ in known if name}
    if len(names) != 1:
        return None
    sets = [found for _, found in known]
    meeting = sympy.Intersection(*sets)
    joined = sympy.Union(*sets) if form.join == "or" or meeting == sympy.S.EmptySet else meeting
    return names.pop(), joined


def _end(form: Form) -> Any | None:
    """The end of an interval: a real constant, or an infinity."""
    if not isinstance(form, Value) or form.before or form.after:
        return None
    found = expression(form.formula.removeprefix("+"))
    if not isinstance(found, sympy.Expr) or found.free_symbols or not found.is_extended_real:
        return None
    return found


def _interval(low: Any | None, high: Any | None, left_open: bool, right_open: bool) -> Region | None:
    """The interval; None if the ends are not numbers or are not in order, like those of a point (3, 1)."""
    if low is None or high is None or bool(low > high):
        return None
    return None, sympy.Interval(low, high, left_open, right_open)


def _region(text: str) -> Region | None:
    text = unwrap(text)
    if text.startswith("\\{") and text.endswith("\\}") and encloses(text, 2):
        return _builder(text[2:-2])
    if text.strip() == "\\emptyset":
        return None, sympy.S.EmptySet
    if match := _BLACKBOARD.fullmatch(text.strip()):
        return None, _positive(_ALL[match[1]], match[2])
    for pattern, combine in ((_UNION, sympy.Union), (_CUT, sympy.Intersection), (_WITHOUT, sympy.Complement)):
        parts = split(text, pattern)
        if len(parts) > 1:
            return _combined(parts, combine)
    member = split(text, _MEMBER)
    if len(member) == 2:
        found = _set(member[1])
        return (member[0].strip(), found[1]) if found is not None and _NAME.fullmatch(member[0].strip()) else None
    if split(text, _ORDER)[1:]:
        return _inequality(text)
    return _bounds(text)


def _positive(numbers: Any, sign: str | None) -> Any:
    return sympy.Intersection(numbers, sympy.Interval.open(0, sympy.oo)) if sign and "+" in sign else numbers


def _combined(parts: list[str], combine: Any) -> Region | None:
    found = [_set(part) for part in parts]
    known = [part for part in found if part is not None]
    if len(known) < len(parts):
        return None
    if combine is sympy.Complement:
        return known[0][0], sympy.Complement(known[0][1], sympy.Union(*(each for _, each in known[1:])))
    name = next((name for name, _ in known if name), None)
    return name, combine(*(each for _, each in known))


def _set(text: str) -> Region | None:
    """A part of a union, parsed like a separate answer; `x \\in [1,2] \\cup [3,4]` names its variable in the first part."""
    form = read(text)
    return region_of(form)


def _bounds(text: str) -> Region | None:
    """An interval with an infinite end or with two kinds of brackets, which `forms` parses as a relation."""
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return None
    parts = split(text[1:-1], re.compile("[,;]"))
    if len(parts) != 2:
        return None
    low, high = (_end(read(part)) for part in parts)
    return _interval(low, high, text[0] == "(", text[-1] == ")")


def _builder(inside: str) -> Region | None:
    parts = split(inside, re.compile(r"\||(?<!\d):"))
    if len(parts) != 2:
        return None
    declared, condition = (_set(part) if index or _MEMBER.search(part) else None for index, part in enumerate(parts))
    if condition is None:
        return None
    return (condition[0], sympy.Intersection(condition[1], declared[1])) if declared else condition


def _inequality(text: str) -> Region | None:
    """A chain of one variable and constants, such as `-2 \\le x < 1`."""
    signs = [match[0] for match in _ORDER.finditer(text) if nesting(text)[match.start()] == 0]
    sides = [side.strip() for side in split(text, _ORDER)]
    names = [index for index, side in enumerate(sides) if _NAME.fullmatch(side) and expression(side) is not None]
    names = [index for index in names if getattr(expression(sides[index]), "free_symbols", None)]
    if len(sides) == 2 and (size := _ABSOLUTE.fullmatch(sides[0])) and signs[0] in ("<", "\\le"):  # |x| < 2
        return _inequality(f"-({sides[1]}) {signs[0]} {size[1]} {signs[0]} {sides[1]}")
    if len(names) != 1 or len(sides) > 3:
        return None
    (name,) = names
    found: Any = sympy.S.Reals
    for index, sign in enumerate(signs):
        if name not in (index, index + 1):
            return None
        value = _end(read(sides[index + 1] if name == index else sides[index]))
        if value is None:
            return None
        found = sympy.Intersection(found, _half_line(sign, value, left=name == index))
    return sides[name], found


def _half_line(sign: str, value: Any, left: bool) -> Any:
    """The numbers to one side of `value`; `left` if the variable is on the left of the sign."""
    if sign == "\\ne":
        return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(value))
    below = (sign in ("<", "\\le")) == left
    is_open = sign in ("<", ">")
    if below:
        return sympy.Interval(-sympy.oo, value, True, is_open)
    return sympy.Interval(value, sympy.oo, is_open, True)
