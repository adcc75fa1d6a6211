r"""The structure of an answer: lists, tuples, sets, equations, relations, matrices and single values.

`readings` parses a normalised text and returns both readings of an ambiguous one (`2,500` is a number or a list of two).
Nothing is evaluated here; a value is a text until it is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from kdrl_mcore.reward.notation import TEXT_BEGIN, TEXT_END, unwrap
from kdrl_mcore.reward.words import Words, split_words, take_qualifier

MAX_ITEMS = 200
MAX_DEPTH = 12
"""Longer or deeper answers are read as single values."""


@dataclass(frozen=True)
class Value:
    """One value: a formula, which may be empty, and the words before and after it."""

    text: str
    formula: str
    before: Words = ()
    after: Words = ()


@dataclass(frozen=True)
class Items:
    r"""Several answers. `opening` and `closing` are `(` and `)`, `[` and `]`, a mixture of them, `\{` and `\}`, or empty for a
    bare list; `join` is what joins its items: `,`, `;`, `and` or `or`."""

    items: tuple[Form, ...]
    opening: str = ""
    closing: str = ""
    join: str = ","
    text: str = ""


@dataclass(frozen=True)
class Equation:
    """Two or more sides joined by equals signs."""

    sides: tuple[Form, ...]
    text: str


@dataclass(frozen=True)
class Relation:
    r"""The description of a region: inequalities, `\in`, unions, set builders, half-open intervals. `regions.py` parses it."""

    text: str


@dataclass(frozen=True)
class Ratio:
    """Parts joined by colons: a ratio, or a time of day."""

    parts: tuple[Form, ...]
    words: Words = ()


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple[Form, ...], ...]


Form = Value | Items | Equation | Relation | Ratio | Matrix

_RELATION = re.compile(r"\\(?:le|ge|ne|in|notin|cup|cap|setminus|subset|subseteq|mathbb|emptyset|backslash)(?![A-Za-z])|[<>]")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_MIXED = re.compile(r"(-?\d+)\s+and\s+(\d+\s*/\s*\d+|\\frac\s*\{\d+\}\s*\{\d+\})")  # `3 and 1/2`
_MATRIX = re.compile(
    r"[(\[|]?\s*\\begin\s*\{(?:[pbvBV]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\s*\{(?:[pbvBV]?matrix|smallmatrix|array)\}"
    r"\s*[)\]|]?",
    re.DOTALL,
)
_NAMED_POINT = re.compile(r"[A-Z](?:'|_\{?\w\}?)?\s*(?=\()")
_DOMAIN = re.compile(r"\s*[a-z](?:\s*,\s*[a-z])*\s*\\in\s*\\mathbb\s*\{?[ZNQRC]\}?(?:\^[+*]|_\{?[+*]\}?)?\s*")
_SEPARATORS = [
    (";", re.compile(";")),
    ("or", re.compile(r"(?<![A-Za-z\\])or(?![a-z])")),
    ("and", re.compile(r"(?<![A-Za-z\\])and(?![a-z])")),
    (",", re.compile(",")),
]


def readings(text: str) -> list[Form]:
    """The possible readings of a normalised answer, the most likely first."""
    found = [read(grouped) for grouped in _thousands(text)]
    if match := _MIXED.fullmatch(text):
        found.append(Value(text, f"{match[1]} {match[2]}"))
    return found


def _thousands(text: str) -> Iterator[str]:
    """The text with the thousands separators removed from its numbers, and the unchanged text if it could be a list."""
    depth = nesting(text)
    bare = [match for match in _THOUSANDS.finditer(text) if depth[match.start()] == 0]
    joined = text
    for match in reversed(bare):
        joined = joined[: match.start()] + match[0].replace(",", "") + joined[match.end() :]
    yield joined
    others = [i for i, character in enumerate(joined) if character == "," and nesting(joined)[i] == 0]
    if joined != text and not others and not any(re.search(r",0\d\d", match[0]) for match in bare):
        yield text


def read(text: str, depth: int = 0) -> Form:
    """The form of one reading."""
    text = unwrap(text)
    if depth > MAX_DEPTH:
        return Value(text, text)
    parts, join = separate(text)
    if len(parts) > 1 and not _RELATION.search(parts[0]):  # drops the domain of a variable, as in `x = 2k, k \in Z`
        parts = [parts[0], *(part for part in parts[1:] if not _DOMAIN.fullmatch(part))]
    if 1 < len(parts) <= MAX_ITEMS:
        return _list(parts, join, text, depth)
    return _single(take_qualifier(unwrap(parts[0]) if len(parts) == 1 else text), depth)


def _list(parts: list[str], join: str, text: str, depth: int) -> Form:
    items: list[Form] = []
    for part in parts:
        item = read(part, depth + 1)
        items += item.items if isinstance(item, Items) and not item.opening and not _is_solution(item) else [item]
    return Items(tuple(items), join=join, text=text)


def _is_solution(items: Items) -> bool:
    """Whether a list assigns values to different names and so is one of several solutions (`x=1, y=2; x=3, y=4`)."""
    names = [item.sides[0] for item in items.items if isinstance(item, Equation)]
    return len(names) == len(items.items) and len(set(names)) == len(names)


def _single(text: str, depth: int) -> Form:
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", match[1]) if row.strip()]
        return Matrix(tuple(tuple(read(entry, depth + 1) for entry in row.split("&")) for row in rows))
    if (found := _signs(text)) is not None:
        return Items(tuple(read(each, depth + 1) for each in found), text=text)
    if len(sides := split(text, _EQUALS)) > 1 and not _RELATION.search(_outside(text)):
        return Equation(tuple(read(side, depth + 1) for side in sides), text)
    if (bracketed := _bracketed(text, depth)) is not None:
        return bracketed
    if match := _NAMED_POINT.match(text):
        point = _bracketed(text[match.end() :], depth)
        if isinstance(point, Items):
            return point
    if _RELATION.search(_outside(text)):
        return Relation(text)
    return _value(text, depth)


def _bracketed(text: str, depth: int) -> Form | None:
    """The tuple, interval or set that the text is, or the content of plain parentheses; None if no pair of brackets encloses
    the whole text."""
    for opening in ("\\{", "(", "["):
        if text.startswith(opening):
            break
    else:
        return None
    ending = "\\}" if text.endswith("\\}") else text[-1:]
    if ending not in (")", "]", "\\}") or (opening == "\\{") != (ending == "\\}"):
        return None
    if not encloses(text, len(ending)):
        return None
    inside = text[len(opening) : len(text) - len(ending)]
    if opening == "\\{" and (_RELATION.search(inside) or re.search(r"(?<!\d):|\|", inside)):
        return Relation(text)
    parts = [part for part in split(inside, re.compile("[,;]")) if part.strip()]
    if len(parts) > MAX_ITEMS or (not parts and opening != "\\{"):
        return None
    if opening != "\\{" and len(parts) == 1:
        return read(inside, depth + 1) if opening + ending == "()" else None
    infinite = opening != "\\{" and len(parts) == 2 and "\\infty" in inside
    if infinite or opening + ending in ("(]", "[)"):
        return Relation(text)
    items: list[Form] = []
    for part in parts:
        item = read(part, depth + 1)
        items += item.items if opening == "\\{" and isinstance(item, Items) and not item.opening else [item]
    return Items(tuple(items), opening, ending, text=text)


def encloses(text: str, width: int) -> bool:
    """Whether the bracket that opens the text is closed only by the bracket at its end, which is `width` characters long."""
    levels = nesting(text)
    inner = zip(text[1:-width], levels[1:-width], strict=True)
    return not any(level < 1 or (level == 1 and character in ")]}") for character, level in inner)


def _value(text: str, depth: int) -> Form:
    parts = split_words(text)
    formulas = [index for index, part in enumerate(parts) if isinstance(part, str)]
    if len(formulas) == 1:
        (index,) = formulas
        before, formula, after = _together(parts[:index]), str(parts[index]), _together(parts[index + 1 :])
        colons = split(formula, re.compile(":"))
        if len(colons) > 1 and not before and all(part.strip() for part in colons):
            return Ratio(tuple(read(part, depth + 1) for part in colons), after)
        return Value(text, formula, before, after)
    if not formulas:
        return Value(text, "", (), _together(parts))
    return Items(tuple(_quantities(parts)), text=text)


def _together(parts: list[str | Words]) -> Words:
    return tuple(word for part in parts if not isinstance(part, str) for word in part)


def _quantities(parts: list[str | Words]) -> Iterator[Value]:
    """The values of `3 hours 20 minutes`: each formula with the words after it, or before it if the text begins with words."""
    labels_first = not isinstance(parts[0], str)
    starts = [index for index, part in enumerate(parts) if isinstance(part, str) is not labels_first]
    starts = [start for start in starts if start == 0 or isinstance(parts[start - 1], str) is labels_first]
    for begin, end in pairwise([*starts, len(parts)]):
        group = parts[begin:end]
        formula = " ".join(part for part in group if isinstance(part, str))
        words = _together(group)
        text = f"{formula} {' '.join(words)}"
        yield Value(text, formula, words, ()) if labels_first else Value(text, formula, (), words)


def _signs(text: str) -> tuple[str, str] | None:
    r"""The two values of a text with `\pm` (`\mp` takes the opposite sign); None without it."""
    if not re.search(r"\\pm(?![A-Za-z])", text):
        return None
    plus = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    minus = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return plus, minus


def separate(text: str) -> tuple[list[str], str]:
    r"""The items of a bare list, and the separator between them: semicolons are tried first, then `or`, `and` and commas.
    Empty items are dropped."""
    for join, pattern in _SEPARATORS:
        items = [item.strip() for item in split(text, pattern) if item.strip()]
        if len(items) > 1:
            return items, join
    return items, ","


def split(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The text split where the pattern matches outside all brackets and marked words."""
    levels = nesting(text)
    pieces, begin = [], 0
    for match in pattern.finditer(text):
        if levels[match.start()] == 0:
            pieces.append(text[begin : match.start()])
            begin = match.end()
    return [*pieces, text[begin:]]


def nesting(text: str) -> list[int]:
    """The number of brackets open around each character; a bracket itself counts as inside. Any closing bracket closes one."""
    levels, depth, position = [0] * len(text), 0, 0
    while position < len(text):
        character = text[position]
        escaped = character == "\\" and text[position + 1 : position + 2] in ("{", "}")
        bracket = text[position + 1] if escaped else character
        environment = character == "\\" and text.startswith(("\\begin", "\\end"), position)
        if bracket in "([{" or bracket == TEXT_BEGIN or (environment and text[position + 1] == "b"):
            depth += 1
            levels[position] = depth
        elif bracket in ")]}" or bracket == TEXT_END or environment:
            levels[position] = depth
            depth = max(0, depth - 1)
        else:
            levels[position] = depth
        if escaped:
            levels[position + 1] = levels[position]
            position += 1
        position += 1
    return levels


def _outside(text: str) -> str:
    """The characters outside all brackets and marked words."""
    return "".join(character for character, level in zip(text, nesting(text), strict=True) if level == 0)
