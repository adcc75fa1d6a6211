"""Whether two answers that were read as forms are equal: lists, equations, relations, matrices, ratios and values."""

from __future__ import annotations

import re

import sympy
from sympy.core.function import AppliedUndef

from kdrl_mcore.reward.algebra import by_math_verify, equal_formulas, expression, number
from kdrl_mcore.reward.forms import Equation, Form, Items, Matrix, Ratio, Relation, Value
from kdrl_mcore.reward.notation import MARKS, TEXT_BEGIN, TEXT_END
from kdrl_mcore.reward.numbers import spelled
from kdrl_mcore.reward.regions import equal_regions, region_of
from kdrl_mcore.reward.words import canonical, contradict, take_magnitude

_NAME = re.compile(
    r"\\?[A-Za-z]+(?:'+|_\{?[\w,]+\}?|\^\{-1\})*(?:\s*\([^()]*\))?|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)"
    rf"|(?:m\s*)?\\(?:angle|triangle|overline|vec|hat|bar|widehat)\s*\{{?\s*[A-Za-z]+\s*\}}?|\|[A-Za-z]+\||\[[A-Z]+\]|{TEXT_BEGIN}.*{TEXT_END}"
)
_FUNCTION = re.compile(r"([A-Za-z]+)\s*\(\s*([A-Za-z])\s*\)")


def equal_forms(first: Form, second: Form) -> bool:
    """Whether two forms are equal; the first is the reference's."""
    if isinstance(first, Equation) or isinstance(second, Equation):
        return _same_equations(first, second)
    if isinstance(first, Relation) or isinstance(second, Relation) or _has_relations(first) or _has_relations(second):
        return _same_relations(first, second)
    if isinstance(first, Matrix) or isinstance(second, Matrix):
        return _same_matrices(first, second)
    if isinstance(first, Items) or isinstance(second, Items):
        return _same_items(first, second)
    if isinstance(first, Ratio) or isinstance(second, Ratio):
        return _same_ratios(first, second)
    assert isinstance(first, Value) and isinstance(second, Value)
    return _same_values(first, second)


def _same_equations(first: Form, second: Form) -> bool:
    if isinstance(first, Equation) and isinstance(second, Equation):
        if not (_holds(first) and _holds(second)):
            return False
        name, other = _name(first.sides[0]), _name(second.sides[0])
        if name and other and _same_name(name, other):
            return equal_forms(first.sides[-1], _renamed(second.sides[-1], other, name))
        tuples = all(isinstance(side, Items) for each in (first, second) for side in each.sides)
        if tuples:
            return all(equal_forms(one, two) for one, two in zip(first.sides, second.sides, strict=False))
        return by_math_verify(_plain(first.text), _plain(second.text))
    if isinstance(first, Equation):
        named = _name(first.sides[0])
        if isinstance(second, Items) and isinstance(first.sides[0], Items):  # `(x, y) = (1, 2)` equals `x = 1, y = 2`
            values = _values_of(second, first.sides[0])
            return values is not None and equal_forms(first.sides[-1], values)
        return (bool(named) or _is_symbolic(first)) and _holds(first) and equal_forms(first.sides[-1], second)
    assert isinstance(second, Equation)
    if isinstance(second.sides[0], Items) and isinstance(first, Items) and _is_assigned(first):
        values = _values_of(first, second.sides[0])
        return values is not None and equal_forms(values, second.sides[-1])
    return _holds(second) and equal_forms(first, second.sides[-1])


def _is_symbolic(equation: Equation) -> bool:
    """Whether the equation gives the value of its left side (`x + y = 5`, `a : b = 1 : 2`) rather than describing a curve: the
    left side has only symbols, and the right side is not 0."""
    left, right = (equation.text.split("=", 1)[0], equation.sides[-1])
    only_symbols = not re.search(r"\d", re.sub(r"_\s*(?:\{[^{}]*\}|\w)", "", left))
    return only_symbols and not (isinstance(right, Value) and right.formula == "0")


def _holds(equation: Equation) -> bool:
    """Whether all constants among the sides are equal: `13 = 12` is never an answer."""
    constants = [side for side in equation.sides if isinstance(side, Value) and _is_constant(side)]
    return all(_same_values(side, constants[-1]) for side in constants[:-1])


def _is_constant(value: Value) -> bool:
    if value.before or not value.formula:
        return False
    if number(value.formula) is not None:
        return True
    if not re.search(r"\d|\\pi|\\infty", value.formula):
        return False
    found = expression(value.formula)
    return isinstance(found, sympy.Expr) and not found.free_symbols and not found.atoms(AppliedUndef)


def _name(side: Form) -> str:
    """The name on the left side of an equation, without spaces; empty if that side is an expression."""
    if isinstance(side, Value):
        plain = side.text.strip()
        return "".join(plain.split()) if plain and _NAME.fullmatch(plain) else ""
    if isinstance(side, Items) and all(isinstance(each, Value) and each.formula.isalpha() for each in side.items):
        return "".join(side.text.split())
    return ""


def _same_name(name: str, other: str) -> bool:
    if name == other or (TEXT_BEGIN in name) != (TEXT_BEGIN in other):
        return True
    one, two = _FUNCTION.fullmatch(name), _FUNCTION.fullmatch(other)
    if one and two:
        return one[1] == two[1]
    function = one or two
    return bool(function and function[2] != "y" and "y" in (name, other))  # y = 2x, f(x) = 2x


def _renamed(form: Form, name: str, target: str) -> Form:
    """The value of f(n) with n renamed to x if the reference has f(x)."""
    one, two = _FUNCTION.fullmatch(name), _FUNCTION.fullmatch(target)
    if not one or not two or one[2] == two[2] or not isinstance(form, Value):
        return form
    renamed = re.sub(rf"(?<![A-Za-z\\]){one[2]}(?![A-Za-z])", two[2], form.formula)
    return Value(renamed, renamed, form.before, form.after)


def _is_assigned(items: Items) -> bool:
    return all(isinstance(item, Equation) and _name(item.sides[0]) for item in items.items)


def _values_of(items: Items, names: Items) -> Form | None:
    """The values of `x = 1, y = 2` as a tuple in the order of `names`; a tuple unchanged; None if the names differ."""
    if not _is_assigned(items):
        return items
    values = {_name(item.sides[0]): item.sides[-1] for item in items.items if isinstance(item, Equation)}
    wanted = [_name(each) for each in names.items]
    return Items(tuple(values[each] for each in wanted), "(", ")") if set(wanted) == set(values) else None


def _has_relations(form: Form) -> bool:
    return isinstance(form, Items) and not form.opening and any(isinstance(item, Relation) for item in form.items)


def _same_relations(first: Form, second: Form) -> bool:
    one, other = region_of(first, like=second), region_of(second, like=first)
    if one is not None and other is not None:
        return equal_regions(one, other)
    if isinstance(first, Items) and isinstance(second, Items) and not first.opening and not second.opening:
        return _match(first.items, second.items)
    if isinstance(first, Relation) and isinstance(second, Relation):
        return MARKS.sub("", first.text) == MARKS.sub("", second.text) or by_math_verify(first.text, second.text)
    if isinstance(first, Relation) and isinstance(second, Items) and second.opening:
        return by_math_verify(first.text, second.text)
    if isinstance(second, Relation) and isinstance(first, Items) and first.opening:
        return by_math_verify(first.text, second.text)
    return False


def _same_matrices(first: Form, second: Form) -> bool:
    if not (isinstance(first, Matrix) and isinstance(second, Matrix)):
        rows = next(form.rows for form in (first, second) if isinstance(form, Matrix))
        other = second if isinstance(first, Matrix) else first
        return isinstance(other, Value) and len(rows) == 1 and len(rows[0]) == 1 and equal_forms(rows[0][0], other)
    if [len(row) for row in first.rows] != [len(row) for row in second.rows]:
        return False
    pairs = zip(first.rows, second.rows, strict=True)
    return all(equal_forms(one, other) for rows in pairs for one, other in zip(*rows, strict=True))


def _same_items(first: Form, second: Form) -> bool:
    if not (isinstance(first, Items) and isinstance(second, Items)):
        many, one = (first, second) if isinstance(first, Items) else (second, first)
        assert isinstance(many, Items)
        if many.opening in ("(", "[") or not many.items:
            return not many.items and isinstance(one, Value) and one.formula == "\\emptyset"
        return all(equal_forms(first, item) if many is second else equal_forms(item, second) for item in many.items)
    first, second = _unnamed(first, second), _unnamed(second, first)
    if first.opening == second.opening == "" and _is_assigned(first) and _is_assigned(second):
        return _same_assignments(first, second)
    brackets = {first.opening + first.closing, second.opening + second.closing}
    if "\\{\\}" in brackets and not brackets <= {"\\{\\}", ""}:
        return False
    if brackets & {"()", "[]"} or _is_assigned(first) or _is_assigned(second):
        long = len(first.items) > 2
        if len(brackets) == 2 and "[]" in brackets and not long:
            return False
        return len(first.items) == len(second.items) and all(
            equal_forms(one, other) for one, other in zip(first.items, second.items, strict=True)
        )
    return _match(first.items, second.items)


def _unnamed(items: Items, other: Items) -> Items:
    """The values of `x = 1 or x = 2` or of `n = 2, 3, 4`, where one name applies to all; other lists unchanged."""
    equations = [item for item in items.items if isinstance(item, Equation)]
    names = {_name(item.sides[0]) for item in equations}
    several = len(equations) == len(items.items) and len(names) == 1 and not _is_function(next(iter(names)))
    first_only = len(equations) == 1 and isinstance(items.items[0], Equation) and names != {""}
    if items.opening or not (several or first_only) or not all(map(_holds, equations)) or names == {""}:
        return items
    values = tuple(item.sides[-1] if isinstance(item, Equation) else item for item in items.items)
    return Items(values, join=items.join)


def _is_function(name: str) -> bool:
    return _FUNCTION.fullmatch(name) is not None


def _same_assignments(first: Items, second: Items) -> bool:
    """Assignments to the same names in any order; the solutions for one function (`f(x)=x or f(x)=0`) are a set."""
    return _match(first.items, second.items)


def _match(first: tuple[Form, ...], second: tuple[Form, ...]) -> bool:
    """Whether two lists are equal as sets: each item has an equal in the other list."""
    if len(first) == len(second) and all(equal_forms(one, other) for one, other in zip(first, second, strict=True)):
        return True
    left = all(any(equal_forms(one, other) for other in second) for one in first)
    return left and all(any(equal_forms(one, other) for one in first) for other in second)


def _same_ratios(first: Form, second: Form) -> bool:
    """Whether two ratios have the same parts, or two parts each in the same proportion, unless they could be times; 1:2 also
    equals the fraction 1/2."""
    if isinstance(first, Ratio) and isinstance(second, Ratio):
        if contradict(first.words, second.words) or len(first.parts) != len(second.parts):
            return False
        if all(equal_forms(one, other) for one, other in zip(first.parts, second.parts, strict=True)):
            return True
        quotients = [_quotient(each) for each in (first, second)]
        return None not in quotients and quotients[0] == quotients[1]
    ratio, other = (first, second) if isinstance(first, Ratio) else (second, first)
    assert isinstance(ratio, Ratio)
    if not isinstance(other, Value) or other.before or other.after or ratio.words or not re.search(r"\\frac|/", other.formula):
        return False
    value = number(other.formula)
    return value is not None and _quotient(ratio) == value.value


def _quotient(ratio: Ratio) -> object:
    texts = [part.formula if isinstance(part, Value) else "" for part in ratio.parts]
    values = [number(text) for text in texts]
    is_time = len(texts) == 2 and re.fullmatch(r"\d\d", texts[1]) is not None
    if len(values) != 2 or values[0] is None or values[1] is None or not values[1].value or is_time:
        return None
    return values[0].value / values[1].value


def _same_values(first: Value, second: Value) -> bool:
    """Whether the words do not contradict each other and the formulas, times magnitudes such as `million`, are equal."""
    (factor, rest), (other_factor, other_rest) = take_magnitude(first.after), take_magnitude(second.after)
    if not first.formula and not second.formula:
        return first.after == second.after
    if not first.formula or not second.formula:
        words, value = (first.after, second) if not first.formula else (second.after, first)
        if value.formula.isalpha() and not value.before and not value.after and canonical(value.formula) == words:
            return True  # a name in roman and in italics
        counted = spelled(words)
        if counted is not None and not value.before and not value.after:
            return equal_formulas(str(counted), value.formula)
        return words == ("infinity",) and value.formula == "\\infty"
    if (cents := _in_cents(first, second)) is not None:
        return cents
    if contradict(rest, other_rest) or _prefixed(first) != _prefixed(second):
        return False
    if factor == other_factor:
        return equal_formulas(first.formula, second.formula)
    numbers = (number(first.formula), number(second.formula))
    if numbers[0] is None or numbers[1] is None or numbers[0].percent or numbers[1].percent:
        return False
    return numbers[0].value * factor == numbers[1].value * other_factor


CURRENCIES = frozenset({"dollar", "euro", "pound", "yen", "yuan", "rupee", "cent"})


def _in_cents(first: Value, second: Value) -> bool | None:
    """The verdict if both values name a currency and the two differ: 75 cents are 0.75 dollars, and no other two agree."""
    one, other = (({*value.before, *value.after} & CURRENCIES) for value in (first, second))
    if not one or not other or one == other:
        return None
    amount, other_amount = number(first.formula), number(second.formula)
    if amount is None or other_amount is None or (one | other) not in ({"cent", "dollar"}, {"cent", "euro"}):
        return False
    return amount.value * (1 if one == {"cent"} else 100) == other_amount.value * (1 if other == {"cent"} else 100)


def _prefixed(value: Value) -> frozenset[str]:
    """The significant words before a formula; a currency may be omitted."""
    return frozenset(value.before) - CURRENCIES


def _plain(text: str) -> str:
    return text.replace(TEXT_BEGIN, "\\text{").replace(TEXT_END, "}")
