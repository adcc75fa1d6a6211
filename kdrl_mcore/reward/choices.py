r"""The choice that a text makes among labelled options: its letters, in order. Pure functions.

`B`, `(b)`, `\text{B}`, `**B**`, `B. because ...` and `Option B` choose `B`; `A, C`, `(A)(C)` and `AC` choose `AC`; `A or B`
chooses nothing, like any text that is not a choice.
"""

from __future__ import annotations

import re
from itertools import pairwise

from kdrl_mcore.reward.answers import boxed_answer, final_part
from kdrl_mcore.reward.notation import plain_characters

_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal)?|mbox|hbox|math(?:rm|bf|it|sf|tt|cal|bb|normal)|bm|boldsymbol|f?box(?:ed)?)\b"
)
_MARKUP = re.compile(
    r"[*`${}~]|#{2,}|[\u2600-\u27bf]|\\[()\[\],;: ]|\\(?:left|right|quad|qquad|displaystyle)\b|__|\\|\"|(?<!\w)'|'(?!\w)"
)
_LABEL = r"(?:\(\s*[A-Za-z]\s*\)|\[\s*[A-Z]\s*\]|[A-Z](?![A-Za-z'’]))"
_JOIN = r"(?:\s*(?:,|;|&|/|\band\b)\s*(?:and\b\s*)?)"
_LIST = rf"{_LABEL}(?:{_JOIN}?{_LABEL})*"
_LEAD = r"(?:(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answers?|ans\.?|options?|choices?)(?:\s+(?:is|are)|\s*:)?\s*)*"
_WHOLE = re.compile(rf"(?i:{_LEAD})({_LIST})[).:\]]*\s*")
_WITH_TEXT = re.compile(rf"(?i:{_LEAD})(\([A-Za-z]\)|\[[A-Z]\]|[A-Z][).:\]]|[a-z]\))(?!\s*(?i:or|and)\b).*", re.DOTALL)
_SMALL = re.compile(rf"(?i:{_LEAD})\(?([a-z])\)?[).:\]]*")
_RUN = re.compile(r"[A-J]{2,10}")
_KIND = r"(?:options?|choices?|answers?|letters?|statements?|alternatives?|one)"
# A character at a time and a limited number of words: any text takes linear time, and these run without a time limit.
_FILLER = (
    r"(?:\s*[:=\-–—是为选]|\s+(?:to|for|of)\s+(?:the|this|that)\s+\w+|\s+(?:is|are|was|be|would|will|must|should|seems|to|"
    r"therefore|thus|hence|then|clearly|indeed|simply|probably|likely|surely|definitely|just|the|correct|following|options?|"
    r"choices?|letters?|answers?)\b){1,100}"
)
_LEADS_IN = (
    rf"(?i:\banswers?\b|\bans\b\.?|答案|\b(?:correct|right|best)\s+{_KIND}){_FILLER}\s*"
    rf"|(?i:\b(?:choose|chose|select|pick|opt\s+for|go\s+with)\s+(?:(?:the\s+)?{_KIND}\s+)?)(?={_LIST}[).:\]]*\s*(?:[.,;!]|$|because|since))"
    r"|(?<![不])选(?:择\s*)?:?\s*"
    rf"|(?i:\b(?:so|thus|hence|therefore)\s*[,:]?\s*(?:{_KIND}\s+)?)(?={_LIST}[).:\]]*\s*$)"
)
_IS_CORRECT = (
    rf"\s+(?i:is\s+(?:the\s+)?(?:correct|right|best)\b(?:\s+{_KIND}\b|(?!\s*[\w-])|(?=\s+(?:because|since|as|and|but|so|while|given|here)\b))"
    r"|is\s+the\s+(?:final\s+)?answer\b)"
)
_STATED = re.compile(
    rf"(?:{_LEADS_IN})(?P<after>{_LIST})(?P<hedge>[).:\]]*\s*,?\s*(?i:or)\s+(?:{_LABEL}))?"
    rf"|(?P<hedged>{_LABEL}\s*(?i:or)\s+)?(?<![A-Za-z])(?P<before>{_LABEL}){_IS_CORRECT}"
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def chosen(text: str) -> str | None:
    """The letters that the text as a whole chooses, sorted; None if it is not a choice."""
    text = _plain(text)
    if text.startswith("[") and text.endswith("]"):  # a list as a program writes it
        text = text[1:-1].strip()
    if match := _SMALL.fullmatch(text):
        return match[1].upper()
    if match := _WHOLE.fullmatch(text):
        return _letters(match[1])
    if match := _WITH_TEXT.fullmatch(text):
        return _letters(match[1].upper())
    return _letters(text) if _RUN.fullmatch(text) and len(set(text)) == len(text) else None


def choice_of(response: str) -> str | None:
    r"""The letters that a response chooses: in its last box; else in its last `<answer>`; else in the last sentence that states
    an answer; else if the response, its last line or its first line is nothing but a choice. Of a thought before `</think>`
    only boxes count. A box that is not closed chooses nothing: the response was cut off."""
    part = final_part(response)
    boxed = boxed_answer(part)
    if boxed is None and "\\boxed{" in part:
        return None
    found = (chosen(boxed or ""), _stated(_tagged(part)), _stated(part), chosen(boxed_answer(response) or ""))
    return next((letters for letters in found if letters is not None), None) or None


def _tagged(text: str) -> str:
    """The content of the last `<answer>...</answer>`; empty if there is none."""
    tags = [*_TAG.finditer(text)]
    pairs = [(one, two) for one, two in pairwise(tags) if (one[1], two[1]) == ("", "/")]
    return text[pairs[-1][0].end() : pairs[-1][1].start()] if pairs else ""


def _stated(text: str) -> str | None:
    """The choice that a text states, or that it, its last line or its first line is as a whole; empty if it states two."""
    stated = [*_STATED.finditer(_plain(text))]
    if stated:
        last = stated[-1]
        return "" if last["hedge"] or last["hedged"] else _letters(last["after"] or last["before"])
    text = text.strip()
    for whole in (text, text.rpartition("\n")[2], text.partition("\n")[0]):  # an explanation may follow the first line
        if (found := chosen(whole)) is not None:
            return found
    return None


def _plain(text: str) -> str:
    text = _FONT.sub(" ", plain_characters(text))
    return " ".join(_MARKUP.sub(" ", text).split())


def _letters(labels: str) -> str:
    labels = re.sub(r"\(\s*[a-z]\s*\)", lambda match: match[0].upper(), labels)
    return "".join(sorted(set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])|(?<=[A-Z])[A-Z]|[A-Z](?=[A-Z])", labels))))
