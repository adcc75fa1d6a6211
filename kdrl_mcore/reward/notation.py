r"""One spelling for each symbol of an answer: the ways to write it in Unicode, LaTeX and Markdown become one.

Pure functions on text. The result of `normalise` separates words from formulas: the content of `\text{...}` and similar
commands is enclosed in `TEXT_BEGIN` and `TEXT_END`, except `and` and `or`, which join answers.
"""

from __future__ import annotations

import re
import unicodedata

TEXT_BEGIN, TEXT_END = "\ue000", "\ue001"
MARKS = re.compile(f"[{TEXT_BEGIN}{TEXT_END}\\s]")
"""What separates words: the two marks, and space."""
CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "₽": "ruble", "₩": "won", "¢": "cent"}

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ", "0123456789+-=()n", strict=True))
_SYMBOLS = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset ", "⊂": r"\subset ", "⊆": r"\subseteq ", "→": r"\to ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"',
    "∠": r"\angle ", "△": r"\triangle ", "∣": "|", "⟨": "(", "⟩": ")", "〈": "(", "〉": ")", "【": "[", "】": "]",
    "、": ",", "。": ".", "٫": ".", "٬": ",", "٪": "%", "∶": ":", "「": "", "」": "", "☐": "", "■": "", "□": "",
}  # fmt: skip
_GREEK = {
    unicodedata.lookup(f"GREEK SMALL LETTER {name.upper()}"): f"\\{name} "
    for name in "alpha beta gamma delta epsilon zeta eta theta iota kappa mu nu xi pi rho sigma tau phi chi psi omega".split()
} | {"λ": r"\lambda ", "ϕ": r"\phi ", "Δ": r"\Delta ", "Ω": r"\Omega ", "Σ": r"\Sigma "}

_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_SPACES = re.compile(r"(?<!\\)\\[,;:> \n]|~|\\q?quad\b|\\(?:thin|med|thick|en)space\b|\\[hv]space\*?\{[^{}]*\}|\s")
_NO_PRINT = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\.?|\\(?:text)?color\s*\{[^{}]*\}|\\(?:displaystyle|textstyle|scriptstyle"
    r"|limits|nolimits|strut|mathstrut|bf|rm|it|sf|tt|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|checkmark|qed)(?![A-Za-z])"
)
_FONT = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|sc|up|normal|color)?|mbox|hbox|emph|underline|math(?:rm|bf|it|sf|tt|normal|cal)|bm|boldsymbol)\s*"
    r"\{([^{}]*)\}"
)
_JOINS = re.compile(r"(?<![A-Za-z])(and|or)(?![A-Za-z])")
_SHORT_LIST = re.compile(r"\s*\w+(?:\s*,\s*\w+)*\s*,?(?:\s+(?:and|or)\s+\w+)?\s*")
_TURNED = re.compile(
    r"(?:^|(?<=[^\w)\]}])|(?<=\\cup)|(?<=\\cap)|(?<=\\in))([\[\]])([^()\[\]]*[,;][^()\[\]]*)([\[\]])(?=\s*(?:$|[,;)]|\\c[ua]p))"
)
_FRACTION = re.compile(r"\\frac(?![A-Za-z])")
_ARGUMENT = re.compile(r"\s*(\{|\\[A-Za-z]+|[A-Za-z0-9])")
_BLANK_TEXT = re.compile(f"{TEXT_BEGIN}([^A-Za-z{TEXT_END}]*){TEXT_END}")
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\\!\s*", ","),
        (r"\\!", ""),
        (r"\{([,.])\}", r"\1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:leqslant|leqq|leq|le)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geqq|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])|\\not\s*=|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:mid|vert|lvert|rvert)(?![A-Za-z])", "|"),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:langle)(?![A-Za-z])", "("),
        (r"\\(?:rangle)(?![A-Za-z])", ")"),
        (r"\\(?:l?dots|cdots|dotsc)(?![A-Za-z])|\.\.\.+", r"\\ldots "),
        (r"\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degrees?(?![A-Za-z])", r"^\\circ "),
        (r"\\%", "%"),
        (r"(?<=[\d.}\)])\s*(?:percentage|percent|per cent|pct)(?![A-Za-z])", "%"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=[\w)\]}])\*\*(?=[\w({-])", "^"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<=\d)\.(?=\s*/)", ""),
        (r"(?<![=<>!\\])==(?!=)", "="),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\(sin|cos|tan|cot|sec|csc)\s*\^\s*\{\s*-\s*1\s*\}", r"\\arc\1"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"^([^{}]*)\\choose(?![A-Za-z])([^{}]*)$", r"\\binom{\1}{\2}"),
        (
            rf"(?<=\d)\s*\^\s*\{{?\s*{TEXT_BEGIN}?\s*(st|nd|rd|th)\s*{TEXT_END}?\s*\}}?(?![A-Za-z])",
            rf"{TEXT_BEGIN}\1{TEXT_END}",
        ),
        (rf"(?<=\d)(?:\s+|\s*{TEXT_BEGIN}\s*)to(?:\s+|\s*{TEXT_END}\s*)(?=\d)", ":"),
    )
]
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$([^$]*)\$\$",
        r"\$([^$]*)\$",
        r"\\\((.*)\\\)",
        r"\\\[(.*)\\\]",
        r"\*\*([^*]*)\*\*",
        r"\*([^*]*)\*",
        r"__([^_]*)__",
        r"`+([^`]*)`+",
        r'"([^"]*)"',
        r"``(.*)''",
    )
]
_UNIT_LETTERS = frozenset("smghlJNWVAKLCTF")
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")


def normalise(text: str) -> str:
    r"""The answer in one spelling. Idempotent up to white space; unknown notation is left unchanged."""
    text = unwrap(plain_characters(text))
    text = _mark_currencies(text)
    text = _mark_text(_NO_PRINT.sub(" ", text))
    for pattern, replacement in _SPELLINGS[:3]:  # unlike the other spaces, `\!` joins its neighbours
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text)
    for pattern, replacement in _SPELLINGS[3:]:
        text = pattern.sub(replacement, text)
    text = _brace_fractions(text)
    return unwrap(" ".join(_TURNED.sub(_interval, text).split()))


def _brace_fractions(text: str) -> str:
    r"""The text with braces around both arguments of each `\frac`: one without is a digit, a letter or a command."""
    pieces, done = [], 0
    for match in _FRACTION.finditer(text):
        if match.start() >= done:
            pieces.append(text[done : match.end()])
            above, end = _argument(text, match.end())
            below, done = _argument(text, end)
            pieces += [above, below]
    return "".join([*pieces, text[done:]])


def _argument(text: str, start: int) -> tuple[str, int]:
    """The argument of a command that begins here, in braces, and its end; empty if there is none."""
    match = _ARGUMENT.match(text, start)
    if match is None:
        return "", start
    if match[1] != "{":
        inner, end = _argument(text, match.end()) if match[1] == "\\sqrt" else ("", match.end())
        return f"{{{match[1]}{inner}}}", end
    end = closing(text, match.start(1))
    return (f"{{{_brace_fractions(text[match.end() : end])}}}", end + 1) if end > 0 else ("", start)


def _interval(match: re.Match[str]) -> str:
    """`]1, 2[` with the brackets of `(1, 2)`; `[1, 2]` unchanged."""
    return f"{'(' if match[1] == ']' else '['}{match[2]}{')' if match[3] == '[' else ']'}"


def plain_characters(text: str) -> str:
    """Unicode characters as ASCII and LaTeX: digits of any script, full-width forms, roots, fractions, signs."""
    text = unicodedata.normalize("NFC", text)
    if text.isascii():
        return text
    text = _ROOT.sub(_root, text)
    for sign, scripts in (("^", _SUPERSCRIPTS), ("_", _SUBSCRIPTS)):
        pieces = re.split(f"([{re.escape(''.join(scripts))}]+)", text)
        pieces[1::2] = [f"{sign}{{{''.join(scripts[c] for c in piece)}}}" for piece in pieces[1::2]]
        text = "".join(pieces)
    return "".join(map(_plain, text))


def _plain(character: str) -> str:
    if character.isascii() or character in CURRENCIES:
        return character
    if character in _SYMBOLS or character in _GREEK:
        return _SYMBOLS.get(character) or _GREEK.get(character, "")
    category = unicodedata.category(character)
    if category == "Cf":  # zero width, marks of direction
        return ""
    if category == "Zs":
        return " "
    if category == "Pd":
        return "-"
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", character).partition("⁄")
        return f"\\frac{{{above}}}{{{below}}}" if below else above
    folded = unicodedata.normalize("NFKC", character)
    return folded if folded == character else plain_characters(folded)


def _root(match: re.Match[str]) -> str:
    inner = match[2].strip("(){}") if match[2][0] in "({" else match[2]
    return f"\\sqrt{'[3]' if match[1] == '∛' else ''}{{{inner}}}"


def unwrap(text: str) -> str:
    r"""The text without boxes, dollar signs, braces, emphasis or quotes around all of it, and without a final full stop."""
    before = None
    while before != text:
        before = text
        text = text.strip()
        while text.endswith("\\"):
            text = text[:-1].rstrip()
        if text.endswith((".", ",", ";", "?")) and not text.endswith(("\\,", "\\;", "..")):
            text = text[:-1].rstrip()
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        box = _BOX.match(text)
        opening = box.end() - 1 if box else 0
        if text[opening : opening + 1] == "{" and closing(text, opening) == len(text) - 1:
            text = text[opening + 1 : -1]
    return text


def closing(text: str, opening: int) -> int:
    """The position where the brace at `opening` is closed; -1 if it is not. Escaped braces are content."""
    depth, position = 0, opening
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


def _mark_currencies(text: str) -> str:
    r"""`\$` and currency signs as words; dollar signs around formulas as spaces."""
    text = re.sub(r"(?<![A-Za-z])(?:US|CA|AU|HK|NZ)(?=\\?\$)", "", text)
    text = text.replace("\\$", f"{TEXT_BEGIN}dollar{TEXT_END}")
    for sign, word in CURRENCIES.items():
        if sign != "$":
            text = text.replace(sign, f"{TEXT_BEGIN}{word}{TEXT_END}")
    odd = text.count("$") % 2 == 1
    return text.replace("$", f"{TEXT_BEGIN}dollar{TEXT_END}" if odd else " ")


def _mark_text(text: str) -> str:
    """The text without font commands, the innermost first: words are marked, other contents become part of the formula."""
    before = None
    while before != text:
        before = text
        text = _FONT.sub(_marked, text)
    return text


def _marked(match: re.Match[str]) -> str:
    command, content = match[1], match[2].replace("~", " ").replace(TEXT_BEGIN, "").replace(TEXT_END, "")
    letters = re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", content)
    unit = letters in _UNIT_LETTERS and re.search(r"[\d})]\s*$", match.string[: match.start()])
    formula = not letters or (len(letters) == 1 and not command.startswith(("text", "mbox", "hbox")) and not unit)
    if formula or (re.fullmatch(r"\s*[(\[]?[A-Za-z][)\]]?\s*", content) and _is_label(match)):
        return f" {content} " if command.startswith(("text", "mbox", "hbox")) else content
    if _SHORT_LIST.fullmatch(content):
        content = content.replace(",", f"{TEXT_END},{TEXT_BEGIN}")
    parts = _JOINS.split(content)
    marked = [part if index % 2 else f"{TEXT_BEGIN}{part}{TEXT_END}" for index, part in enumerate(parts)]
    return _BLANK_TEXT.sub(r" \1 ", " ".join(marked))


def _is_label(match: re.Match[str]) -> bool:
    """Whether a single letter is a choice or a name: nothing precedes it. After a number it is a unit."""
    return not match.string[: match.start()].strip(" ({[$")
