r"""Finding the answer in a text, and comparisons that need no algebra: pure functions, linear in the length of the text."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

MAX_ANSWER_CHARS = 2000
"""A longer boxed text is not an answer: this limits the input of the parser for any response."""
MAX_BOXES = 50
"""The most boxes that can form one answer."""

_BOX = re.compile(r"\\boxed\s*\{")
_ANY_BOX = re.compile(r"\\boxed\s*(?:\{|([0-9][A-Za-z0-9.,]*|[A-Za-z](?![A-Za-z])))")
_BRACE = re.compile(r"\\[\\{}]|[{}]")  # an escaped brace is content
_FRAMED = re.compile(r"\\fbox(?=\s*\{)")
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_GRADE_SCHOOL = re.compile(r"(?:^|\n|\s)####\s*([^\n]+?)\s*$")
_OWN_THOUGHT = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THOUGHT_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?。]\s|[.!?。]$|\n\s*\n")
_SEPARATOR = re.compile(r"[,;、]|\\\\|&|\b(?:and|or)\b", re.IGNORECASE)
_TAKEN_BACK = re.compile(
    r"\b(?:not?|wait|instead|rather|actually|but|hmm|correct(?:ion|ed)?|wrong|so|thus|hence|therefore|then|final(?:ly)?|is|gives)\b"
    r"|=>|\\implies|\\Rightarrow|\u2192",
    re.IGNORECASE,
)


def final_part(text: str) -> str:
    """The text after the response's thought (`</think>`). Without a thought that is the whole text; a thought that does not end
    is cut off."""
    ends = list(_THOUGHT_END.finditer(text))
    if ends:
        return text[ends[-1].end() :]
    begun = _OWN_THOUGHT.search(text)
    return text if begun is None else text[: begun.start()]


def count_boxes(text: str) -> int:
    r"""The number of times that the text opens a `\boxed{`."""
    return len(_BOX.findall(text))


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` in the text, stripped; that of `\boxed 5` is 5.

    Braces are balanced; an escaped brace (`\{`) is content. None if there is no box, or if the last one is not closed
    within `MAX_ANSWER_CHARS` characters: an earlier box never replaces it.
    """
    boxes = _boxes(text)
    return boxes[-1][2] if boxes else None


def boxed_answer(text: str) -> str | None:
    r"""The boxed answer of a response: its last box, together with the boxes of the same sentence that form a list with it.

    `\boxed{1} and \boxed{2}` is the answer `1; 2`: one list, which can equal a reference that is a list too, but neither 1
    nor 2. Other boxes are ignored, so a response gains nothing by boxing several candidates. A box in a thought counts only
    if nothing is boxed after the thought, and never in a thought that does not end.
    """
    part = final_part(text)
    if not _boxes(part) and _THOUGHT_END.search(text):
        part = text[: [*_THOUGHT_END.finditer(text)][-1].start()]
    return _listed(part, _lists)


def _listed(text: str, joined: Callable[[str], bool]) -> str | None:
    """The contents of the last box and of the boxes before it as long as the text between two of them is `joined`; None without
    a box."""
    boxes = _boxes(text)
    if not boxes or boxes[-1][2] is None:
        return None
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if len(listed) >= MAX_BOXES or not joined(text[box[1] : listed[0][0]]):
            break
        listed.insert(0, box)
    contents = [content for _, _, content in listed if content]
    answer = "; ".join(contents) if len(contents) == len(listed) else ""  # an empty box or a list with one is no answer
    return answer if len(answer) <= MAX_ANSWER_CHARS else None


def free_answer(text: str) -> str | None:
    r"""The answer of a response that does not have to box it: `\boxed{...}` if it does, else the end of its text."""
    if _boxes(text):
        boxed = boxed_answer(text)
        return f"\\boxed{{{boxed}}}" if boxed else None
    return final_part(text).strip()[-MAX_ANSWER_CHARS:] or None


def _lists(between: str) -> bool:
    """Whether the text between two boxes joins them into a list: it has a separator, ends no sentence and retracts nothing."""
    if len(between) > 200 or _SENTENCE_END.search(between) or _TAKEN_BACK.search(between):
        return False
    return _SEPARATOR.search(between) is not None


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Start, end and content of each outermost box. A box that is not closed has no content and is the last."""
    found: list[tuple[int, int, str | None]] = []
    end = 0
    for match in _ANY_BOX.finditer(text):
        if match.start() < end:
            continue  # inside another box; the innermost one counts, see below
        if match[1]:
            end = match.end()
            found.append((match.start(), end, match[1].rstrip(".,")))
            continue
        closed = _closing(text, match.end())
        end = match.end() if closed is None else closed + 1
        content = None if closed is None else text[match.end() : closed].strip()
        if content and _ANY_BOX.search(content):
            content = last_boxed(content)
        found.append((match.start(), end, content))
    return found


def _closing(text: str, start: int) -> int | None:
    """The position where the brace before `start` is closed; None if that is not within `MAX_ANSWER_CHARS` characters."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + MAX_ANSWER_CHARS + 1):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return match.start()
    return None


class WrittenFloat(float):
    """A float that keeps its text: `0.10` stays `0.10`, and no digit is lost."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Parse the text."""
        made = super().__new__(cls, text)
        made.text = text
        return made


def answer_text(value: Any) -> str | None:
    """The value of an answer column as text; None if it is not an answer.

    Strings stay unchanged. Numbers are written with all their digits, whole ones without a decimal point, and dates as
    2024-01-31. A list of these is joined by commas, and lists in it are tuples; a list of objects, such as the tests of a
    program, becomes JSON.
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _number_text(value)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, list) and value:
        if all(isinstance(each, dict) for each in value):
            return json.dumps(value)
        texts = [_item_text(each) for each in value]
        return ", ".join(text for text in texts if text) if None not in texts else None
    return None


def _item_text(item: Any) -> str | None:
    """An item of a list as text; a list of several is a tuple in it."""
    text = answer_text(item)
    return f"({text})" if text and isinstance(item, list) and len(item) > 1 else text


def _number_text(value: float | Decimal) -> str | None:
    if isinstance(value, int):
        return str(value)
    if isinstance(value, WrittenFloat):
        exact, text = Decimal(value.text), value.text
    else:
        exact, text = Decimal(str(value)), repr(value) if isinstance(value, float) else f"{value:f}"
    if not exact.is_finite():
        return None
    is_whole = exact == exact.to_integral_value() and abs(exact) < Decimal(10) ** 25
    return str(int(exact)) if is_whole else text


def reference_answer(answer: str) -> str:
    r"""The bare reference answer, stripped of its `\boxed{}` (several become a list), `\fbox{}` or dollar signs if it has them;
    the text after GSM8K's `####`; the items of a JSON list of strings. A text of which nothing would remain is unchanged."""
    if match := _GRADE_SCHOOL.search(answer.rstrip()[-MAX_ANSWER_CHARS:]):
        return match[1].strip()
    boxed = _listed(_FRAMED.sub(r"\\boxed", answer), lambda between: not _SENTENCE_END.search(between))
    text = _as_list(answer.strip()) if boxed is None else boxed
    inner = text.strip("$")
    bare = inner.strip() if text.startswith("$") and text.endswith("$") and "$" not in inner else text
    return bare or text


def _as_list(text: str) -> str:
    """A JSON list of strings (`["1", "2"]`) as a list of answers; any other text unchanged."""
    if text.startswith('["') and text.endswith('"]'):
        try:
            items = json.loads(text)
        except ValueError:
            return text
        if all(isinstance(item, str) and item.strip() for item in items):
            return ", ".join(items)
    return text


def compare_plainly(reference: str, answer: str) -> bool | None:
    """Whether two answers are equal, if that can be decided without a parser; None otherwise.

    Two cases are decided here: equal strings are equal answers however they are read, and two plain integers (an optional
    minus and at most 15 digits) are equal exactly if their values are. Everything else is left to `equivalent`.
    """
    if reference == answer:
        return True
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return int(reference) == int(answer)
    return None
