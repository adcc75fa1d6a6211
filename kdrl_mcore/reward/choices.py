r"""The choice that a text makes among labelled options: its letters, in order. Pure functions.

`B`, `(b)`, `\text{B}`, `**B**`, `B. because ...` and `Option B` choose `B`; `A, C`, `(A)(C)` and `AC` choose `AC`; `A or B`
chooses nothing, like any text that is not a choice.
"""

from __future__ import annotations

import re

from kdrl_mcore.reward.answers import boxed_answer, final_part
from kdrl_mcore.reward.notation import plain_characters

_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal)?|mbox|hbox|math(?:rm|bf|it|sf|tt|cal|bb|normal)|bm|boldsymbol|boxed)\b"
)
_MARKUP = re.compile(r"[*`${}~]|\\[()\[\],;: ]|\\(?:left|right|quad|qquad|displaystyle)\b|__|\\|\"|(?<!\w)'|'(?!\w)")
_LABEL = r"(?:\(\s*[A-Z]\s*\)|\[\s*[A-Z]\s*\]|[A-Z](?![A-Za-z'’]))"
_JOIN = r"(?:\s*(?:,|;|&|/|\band\b)\s*(?:and\b\s*)?)"
_LIST = rf"{_LABEL}(?:{_JOIN}?{_LABEL})*"
_LEAD = r"(?:(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answers?|options?|choices?)(?:\s+(?:is|are)|\s*:)?\s*)*"
_WHOLE = re.compile(rf"(?i:{_LEAD})({_LIST})[).:\]]*\s*")
_WITH_TEXT = re.compile(rf"(?i:{_LEAD})(\([A-Z]\)|\[[A-Z]\]|[A-Z][).:\]])(?!\s*(?i:or|and)\b).*", re.DOTALL)
_RUN = re.compile(r"[A-J]{2,10}")
_FILLER = (
    r"(?:\s*[:=\-–—是为]+|\s+(?:to|for|of)\s+(?:the|this|that)\s+\w+|\s+(?:is|are|was|be|would|will|must|should|seems|to|therefore|thus|hence|then|clearly|indeed|simply|probably|likely|surely|definitely|just|the|correct|"
    r"following|options?|choices?|letters?|answers?)\b)"
)
_STATED = re.compile(
    rf"(?i:(?:\banswers?\b|答案|\b(?:correct|right|best)\s+(?:option|choice|letter|statement|alternative)s?\b){_FILLER}+)\s*"
    rf"(?P<after>{_LIST})(?P<hedge>[).:\]]*\s*,?\s*(?i:or)\s+(?:{_LABEL}))?"
    rf"|(?P<hedged>{_LABEL}\s*(?i:or)\s+)?(?<![A-Za-z])(?P<before>{_LABEL})\s+(?i:is\s+(?:the\s+)?(?:correct|right|best)\b|is\s+the\s+(?:final\s+)?answer\b)"
)


def chosen(text: str) -> str | None:
    """The letters that the text as a whole chooses, sorted; None if it is not a choice."""
    text = _plain(text)
    if re.fullmatch("[a-z]|[(][a-z][)]", text):
        text = text.upper()
    if match := _WHOLE.fullmatch(text):
        return _letters(match[1])
    if match := _WITH_TEXT.fullmatch(text):
        return _letters(match[1])
    return _letters(text) if _RUN.fullmatch(text) and len(set(text)) == len(text) else None


def choice_of(response: str) -> str | None:
    r"""The letters that a response chooses: in its last box; else in the last sentence that states an answer; else if the
    response or its last line is nothing but a choice. Of a thought before `</think>` only boxes count. A box that is not closed
    chooses nothing: the response was cut off."""
    part = final_part(response)
    in_box = boxed_answer(part)
    if in_box is None and "\\boxed{" in part:
        return None
    boxed = chosen(in_box or "")
    if boxed is not None:
        return boxed
    stated = [*_STATED.finditer(_plain(part))]
    if stated:
        last = stated[-1]
        return None if last["hedge"] or last["hedged"] else _letters(last["after"] or last["before"])
    for whole in (part, part.strip().rpartition("\n")[2]):
        if (found := chosen(whole)) is not None:
            return found
    return chosen(boxed_answer(response) or "")


def _plain(text: str) -> str:
    text = _FONT.sub(" ", plain_characters(text))
    return " ".join(_MARKUP.sub(" ", text).split())


def _letters(labels: str) -> str:
    return "".join(sorted(set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])|(?<=[A-Z])[A-Z]|[A-Z](?=[A-Z])", labels))))
