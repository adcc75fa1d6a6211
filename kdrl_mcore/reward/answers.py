r"""Finding the answer in a text, and the comparisons that need no algebra: pure functions, linear in the text's length."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

MAX_ANSWER_CHARS = 2000
"""A boxed answer longer than this is no answer: it bounds what reaches the parser, whatever the response holds."""
MAX_BOXES = 50
"""Boxes that can make one answer."""

_BOX = re.compile(r"\\boxed\s*\{")
_ANY_BOX = re.compile(r"\\boxed\s*(?:\{|([A-Za-z0-9][A-Za-z0-9.,]*))")
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
    """What stands behind the response's thought (`</think>`); all of it without one, nothing of a thought that has no end."""
    ends = list(_THOUGHT_END.finditer(text))
    if ends:
        return text[ends[-1].end() :]
    begun = _OWN_THOUGHT.search(text)
    return text if begun is None else text[: begun.start()]


def count_boxes(text: str) -> int:
    r"""How many `\boxed{` the text opens."""
    return len(_BOX.findall(text))


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of the text holds, stripped; `\boxed 5` holds 5.

    Braces are balanced; an escaped brace (`\{`) is content. None if there is no box, or if the last one is not closed
    within `MAX_ANSWER_CHARS` characters: an earlier box never stands in for it.
    """
    boxes = _boxes(text)
    return boxes[-1][2] if boxes else None


def boxed_answer(text: str) -> str | None:
    r"""The answer that a response boxes: its last box, and with it the boxes of the same sentence that it is listed with.

    `\boxed{1} and \boxed{2}` is the answer `1; 2`: one list, which equals a reference that is a list too, and neither 1 nor 2.
    Boxes elsewhere play no part, so a response gains nothing by boxing several candidates. A box in a thought counts only
    where nothing is boxed behind it, and never in a thought that has no end.
    """
    part = final_part(text)
    if not _boxes(part) and _THOUGHT_END.search(text):
        part = text[: [*_THOUGHT_END.finditer(text)][-1].start()]
    return _listed(part, _lists)


def _listed(text: str, joined: Callable[[str], bool]) -> str | None:
    """The contents of the last box and of those before it as far as what stands between has them joined; None without one."""
    boxes = _boxes(text)
    if not boxes or boxes[-1][2] is None:
        return None
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if len(listed) >= MAX_BOXES or not joined(text[box[1] : listed[0][0]]):
            break
        listed.insert(0, box)
    contents = [content for _, _, content in listed if content]
    answer = "; ".join(contents) if len(contents) == len(listed) else ""  # an empty box is no answer, nor is a list with one
    return answer if len(answer) <= MAX_ANSWER_CHARS else None


def free_answer(text: str) -> str | None:
    r"""The answer of a response that need not box it: `\boxed{...}` with what it boxes, else the end of what it says."""
    if _boxes(text):
        boxed = boxed_answer(text)
        return f"\\boxed{{{boxed}}}" if boxed else None
    return final_part(text).strip()[-MAX_ANSWER_CHARS:] or None


def _lists(between: str) -> bool:
    """Whether the text between two boxes joins them to a list: a separator, and no sentence's end or second thoughts."""
    if len(between) > 200 or _SENTENCE_END.search(between) or _TAKEN_BACK.search(between):
        return False
    return _SEPARATOR.search(between) is not None


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Begin, end and content of each outermost box; no content where a box is not closed, which is then the last."""
    found: list[tuple[int, int, str | None]] = []
    end = 0
    for match in _ANY_BOX.finditer(text):
        if match.start() < end:
            continue  # a box in a box, of which the innermost counts
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
    """Where the brace before `start` is closed, within `MAX_ANSWER_CHARS` characters; None where it is not."""
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
                return position
        position += 1
    return None


def answer_text(value: Any) -> str | None:
    """An answer column's value as text; None where it is none.

    Texts stay as they are, numbers are written out (a float that is whole without its point), a list of them is joined by
    commas, and a list of objects, such as the tests of a program, is written as JSON.
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if float(value).is_integer() else repr(value)
    if isinstance(value, list) and value:
        if all(isinstance(each, dict) for each in value):
            return json.dumps(value)
        texts = [answer_text(each) for each in value]
        return ", ".join(text for text in texts if text) if None not in texts else None
    return None


def reference_answer(answer: str) -> str:
    r"""The bare reference answer, stripped: out of its `\boxed{}` (several are a list), `\fbox{}` or dollar signs, or behind
    GSM8K's `####`, where it has them; the items of a JSON list of texts. What would leave nothing stays as it is."""
    if match := _GRADE_SCHOOL.search(answer):
        return match[1].strip()
    boxed = _listed(_FRAMED.sub(r"\\boxed", answer), lambda between: not _SENTENCE_END.search(between))
    text = _as_list(answer.strip()) if boxed is None else boxed
    inner = text.strip("$")
    bare = inner.strip() if text.startswith("$") and text.endswith("$") and "$" not in inner else text
    return bare or text


def _as_list(text: str) -> str:
    """A JSON list of texts (`["1", "2"]`) as a list of answers; any other text as it is."""
    if text.startswith('["') and text.endswith('"]'):
        try:
            items = json.loads(text)
        except ValueError:
            return text
        if all(isinstance(item, str) and item.strip() for item in items):
            return ", ".join(items)
    return text


def compare_plainly(reference: str, answer: str) -> bool | None:
    """Whether two answers are equal, where that needs no parser; None where it does.

    Two cases are decided here. Equal strings are equal answers under every reading of them. Two plain integers (an
    optional minus and at most 15 digits) are equal exactly if their values are. Anything else is for `equivalent`.
    """
    if reference == answer:
        return True
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return int(reference) == int(answer)
    return None
