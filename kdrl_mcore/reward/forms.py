r"""The structure of an answer: lists, tuples, sets, equations, relations, matrices and single values.

`readings` takes a normalised text apart. Where a text has two readings (`2,500` is a number and a list of two), both are given.
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
"""Longer and deeper answers are single values, whatever they look like."""


@dataclass(frozen=True)
class Value:
    """One value: a formula (which may be empty) and the words before and behind it."""

    text: str
    formula: str
    before: Words = ()
    behind: Words = ()


@dataclass(frozen=True)
class Items:
    r"""Several answers. `opening` and `closing` are `(` and `)`, `[` and `]`, mixtures of them, `\{` and `\}`, or empty for a
    bare list, whose items `join` joins: `,`, `and` or `or`."""

    items: tuple[Form, ...]
    opening: str = ""
    closing: str = ""
    join: str = ","
    text: str = ""


@dataclass(frozen=True)
class Equation:
    """Sides joined by equals signs, at least two."""

    sides: tuple[Form, ...]
    text: str


@dataclass(frozen=True)
class Relation:
    r"""What describes a region: inequalities, `\in`, unions, set builders, half-open intervals; `regions.py` reads it."""

    text: str


@dataclass(frozen=True)
class Ratio:
    """Parts joined by colons: a ratio, or a time of the day."""

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
    """What the answer may mean, the likeliest first. `text` is normalised."""
    return [read(grouped) for grouped in _thousands(text)]


def _thousands(text: str) -> Iterator[str]:
    """The text with commas between thousands taken out of its numbers, and as a list where that is possible too."""
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
    pieces, join = separate(text)
    if len(pieces) > 1 and not _RELATION.search(pieces[0]):  # `x = 2k, k \in Z` says for which k
        pieces = [pieces[0], *(piece for piece in pieces[1:] if not _DOMAIN.fullmatch(piece))]
    if 1 < len(pieces) <= MAX_ITEMS:
        return _list(pieces, join, text, depth)
    return _single(take_qualifier(unwrap(pieces[0]) if len(pieces) == 1 else text), depth)


def _list(pieces: list[str], join: str, text: str, depth: int) -> Form:
    items: list[Form] = []
    for piece in pieces:
        item = read(piece, depth + 1)
        items += item.items if isinstance(item, Items) and not item.opening and not _is_solution(item) else [item]
    return Items(tuple(items), join=join, text=text)


def _is_solution(items: Items) -> bool:
    """Whether a list assigns values to different names, as one solution of several (`x=1, y=2; x=3, y=4`)."""
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
    """A tuple, interval or set, or what single parentheses hold; None where no pair of brackets holds the whole."""
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
    pieces = [piece for piece in split(inside, re.compile("[,;]")) if piece.strip()]
    if len(pieces) > MAX_ITEMS or (not pieces and opening != "\\{"):
        return None
    if opening != "\\{" and len(pieces) == 1:
        return read(inside, depth + 1) if opening + ending == "()" else None
    infinite = opening != "\\{" and len(pieces) == 2 and "\\infty" in inside
    if infinite or opening + ending in ("(]", "[)"):
        return Relation(text)
    items: list[Form] = []
    for piece in pieces:
        item = read(piece, depth + 1)
        items += item.items if opening == "\\{" and isinstance(item, Items) and not item.opening else [item]
    return Items(tuple(items), opening, ending, text=text)


def encloses(text: str, width: int) -> bool:
    """Whether the bracket that opens the text is closed by the one of this width at its end."""
    levels = nesting(text)
    inner = zip(text[1:-width], levels[1:-width], strict=True)
    return not any(level < 1 or (level == 1 and character in ")]}") for character, level in inner)


def _value(text: str, depth: int) -> Form:
    parts = split_words(text)
    formulas = [place for place, part in enumerate(parts) if isinstance(part, str)]
    if len(formulas) == 1:
        (place,) = formulas
        before, formula, behind = _together(parts[:place]), str(parts[place]), _together(parts[place + 1 :])
        colons = split(formula, re.compile(":"))
        if len(colons) > 1 and not before and all(part.strip() for part in colons):
            return Ratio(tuple(read(part, depth + 1) for part in colons), behind)
        return Value(text, formula, before, behind)
    if not formulas:
        return Value(text, "", (), _together(parts))
    return Items(tuple(_quantities(parts)), text=text)


def _together(parts: list[str | Words]) -> Words:
    return tuple(word for part in parts if not isinstance(part, str) for word in part)


def _quantities(parts: list[str | Words]) -> Iterator[Value]:
    """`3 hours 20 minutes`: each formula with the words behind it, or before it where the words come first."""
    labels_first = not isinstance(parts[0], str)
    starts = [place for place, part in enumerate(parts) if isinstance(part, str) is not labels_first]
    starts = [start for start in starts if start == 0 or isinstance(parts[start - 1], str) is labels_first]
    for begin, end in pairwise([*starts, len(parts)]):
        group = parts[begin:end]
        formula = " ".join(part for part in group if isinstance(part, str))
        words = _together(group)
        text = f"{formula} {' '.join(words)}"
        yield Value(text, formula, words, ()) if labels_first else Value(text, formula, (), words)


def _signs(text: str) -> tuple[str, str] | None:
    r"""The two values of a text with `\pm` (`\mp` takes the other sign); None where it has none."""
    if not re.search(r"\\pm(?![A-Za-z])", text):
        return None
    plus = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    minus = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return plus, minus


def separate(text: str) -> tuple[list[str], str]:
    r"""The pieces of a bare list, and what joins them: semicolons first, then `or`, then commas and `and`. Empty pieces are
    left out."""
    for join, pattern in _SEPARATORS:
        pieces = [piece.strip() for piece in split(text, pattern) if piece.strip()]
        if len(pieces) > 1:
            return pieces, join
    return pieces, ","


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
    """How many brackets are open around each character; a bracket itself counts as inside. Closing any kind closes one."""
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
