r"""Words in and around an answer: units, names of things, magnitudes, and words that change its meaning.

`18 eggs` is a correct answer if the reference is 18, so nouns and units after a number may be omitted, but not contradicted:
5 cm is not 5 m. Words such as "at least", "million" or "even" change the meaning of the number and may not be omitted.
"""

from __future__ import annotations

import re

from kdrl_mcore.reward.notation import TEXT_BEGIN, TEXT_END

Words = tuple[str, ...]

_UNITS = {
    "meter": "m meters metre metres 米", "centimeter": "cm centimeters centimetre centimetres 厘米",
    "millimeter": "mm millimeters millimetre millimetres 毫米", "kilometer": "km kilometers kilometre kilometres 千米 公里",
    "inch": "in inches", "foot": "ft feet", "yard": "yd yds yards", "mile": "mi miles",
    "second": "s sec secs seconds 秒", "minute": "min mins minutes 分钟", "hour": "h hr hrs hours 小时",
    "day": "days 天", "week": "wk weeks", "month": "months", "year": "yr yrs years 年",
    "gram": "g grams 克", "kilogram": "kg kgs kilograms 千克 公斤", "milligram": "mg milligrams",
    "pound": "lb lbs pounds", "ounce": "oz ounces", "ton": "tons tonne tonnes",
    "liter": "l liters litre litres 升", "milliliter": "ml milliliters millilitre millilitres 毫升", "gallon": "gal gallons",
    "joule": "j joules", "kilojoule": "kj kilojoules", "watt": "w watts", "kilowatt": "kw kilowatts", "newton": "n newtons",
    "volt": "v volts", "ampere": "amp amps amperes", "hertz": "hz", "pascal": "pa pascals", "mole": "mol moles",
    "degree": "deg degs degrees 度", "radian": "rad rads radians",
    "dollar": "dollars usd bucks 美元", "euro": "euros eur 欧元", "cent": "cents", "yen": "jpy 円 日元",
    "yuan": "rmb cny 元", "rupee": "rupees rs inr", "square": "sq squares", "cube": "cubes", "cubic": "cu",
}  # fmt: skip
_CANONICAL = {alias: unit for unit, aliases in _UNITS.items() for alias in [unit, *aliases.split()]}
_SHORTHANDS = {"mph": ("mile", "per", "hour"), "kph": ("kilometer", "per", "hour"), "kmh": ("kilometer", "per", "hour")}
_IRREGULAR = {"people": "person", "children": "child", "men": "man", "women": "woman", "mice": "mouse", "geese": "goose"}
_MAGNITUDES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "千": 10**3, "万": 10**4, "亿": 10**8,
}  # fmt: skip
_MODIFIERS = frozenset(
    "more less than at least most not no non none never over under above below between about around approximately roughly "
    "even odd prime composite squared cubed positive negative all every any plus minus half twice double triple "
    "north south east west yes except to or and nor either neither mod modulo remainder "
    "greater fewer smaller larger multiple multiples divisible".split()
)
_FILLERS = frozenset("the a an is are of it answer final equals unit units".split())
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min gcd lcm det dim mod sqrt pi lim arg inf "
    "sup alpha beta gamma delta theta lambda mu sigma phi omega infty oo abs floor ceil frac cdot".split()
)
_SHORT_WORDS = frozenset("is of am pm at to by no it if as on we rs".split())
_QUALIFIERS = frozenset("for where with when whenever such if given assuming since because".split())
_MARKED = re.compile(f"{TEXT_BEGIN}([^{TEXT_END}]*){TEXT_END}")
_UNIT_NAMES = "|".join(sorted((a for a in _CANONICAL if a.isascii() and len(a) > 1), key=len, reverse=True)) + "|mph|kph"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_NAMED_UNIT = rf"(?i:{_UNIT_NAMES}){_POWER}"
_LETTER_UNIT = rf"[smghlJNWVAKLCTF]{_POWER}"
# A single letter is a unit only after a space at the end or before a slash, or in a quotient of units; else it is a variable.
_PLAIN_UNIT = re.compile(
    rf"(?<=[\d}})%])(?:\s*{_NAMED_UNIT}|\s+{_LETTER_UNIT}(?=\s*(?:$|/))|\s*{_LETTER_UNIT}(?=\s*/\s*[A-Za-z]))"
    rf"(?:(?:\.?\s+|\s*/\s*|\s*\\cdot\s*)(?:{_NAMED_UNIT}|{_LETTER_UNIT})(?![A-Za-z(_]))*(?![A-Za-z(^_])\.?"
)
_ONE_UNIT = rf"\{{\s*(?:{TEXT_BEGIN}\s*)?((?:(?:square|cubic)\s+)?[A-Za-z]+{_POWER})\s*(?:{TEXT_END})?({_POWER})\s*\}}"
_QUOTIENT = re.compile(rf"(?<=[\d}}])\s*\\frac\s*{_ONE_UNIT}\s*{_ONE_UNIT}\s*$")
_TEMPERATURE = re.compile(r"\^\\circ\s*([CF])(?![A-Za-z])")
_PLAIN_WORD = re.compile(r"(?<![A-Za-z\\_^{|])([A-Za-z]{2,}(?:['’-][A-Za-z]{4,})*)(?![A-Za-z_^({|=])")
_TIME = re.compile(r"(?<![A-Za-z])([aApP])\.\s?[mM]\.?(?![A-Za-z])")
_FOREIGN = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af\u0400-\u04ff]+")
_POWER_AFTER = r"(\s*\^\s*(?:\{\s*-?\d\s*\}|\d))"
_TOKEN = re.compile(r"[^\W\d_]+|\^\s*\{?\s*(-?\d)\s*\}?|/|\d+")


def split_words(text: str) -> list[str | Words]:
    """The text as a sequence of formulas (strings) and words (tuples in lower case, units in one spelling)."""
    text = _TIME.sub(lambda match: f"{match[1].lower()}m", text)
    text = _MARKED.sub(lambda match: f" {match[1]} " if re.search(r"\d", match[1]) else match[0], text)
    text = _QUOTIENT.sub(_quotient, text)
    text = _TEMPERATURE.sub(rf"^\\circ {TEXT_BEGIN}\1{TEXT_END}", text)
    for pattern in (_FOREIGN, _PLAIN_UNIT, _PLAIN_WORD):
        text = _mark(pattern, text)
    text = re.sub(f"({TEXT_END}){_POWER_AFTER}", r"\2\1", text)
    text = re.sub(rf"{TEXT_END}(\s*/?\s*){TEXT_BEGIN}", r" \1 ", text)
    parts: list[str | Words] = []
    for index, piece in enumerate(_MARKED.split(text)):
        if index % 2:
            if words := canonical(piece):
                parts.append(words)
        elif piece := re.sub(r"^\.\s+|\.$", "", piece.strip(" ,:")).strip():
            parts.append(piece)
    return parts


def _quotient(match: re.Match[str]) -> str:
    """A fraction of two units as words; any other unchanged."""
    above, below = match[1] + match[2], match[3] + match[4]
    units = [re.split(r"[\s^]", name)[0].lower() for name in (match[1], match[3])]
    return f" {TEXT_BEGIN}{above} / {below}{TEXT_END}" if all(unit in _CANONICAL for unit in units) else match[0]


def _mark(pattern: re.Pattern[str], text: str) -> str:
    """Mark the matches of the pattern outside marked words."""

    def quoted(match: re.Match[str]) -> str:
        is_words = pattern is not _PLAIN_WORD or _is_word(match)
        return f"{TEXT_BEGIN}{match[0]}{TEXT_END}" if is_words else match[0]

    pieces = re.split(f"({TEXT_BEGIN}[^{TEXT_END}]*{TEXT_END})", text)
    return "".join(piece if index % 2 else pattern.sub(quoted, piece) for index, piece in enumerate(pieces))


def _is_word(match: re.Match[str]) -> bool:
    """Whether a run of letters is a word rather than a product of variables."""
    lower = match[0].lower()
    if lower in _FUNCTIONS:
        return False
    if lower in _SHORT_WORDS or (lower in _CANONICAL and len(lower) > 2):
        return True
    if len(lower) < 3 or not re.search("[aeiou]", lower):
        return False
    neighbours = match.string[: match.start()].rstrip()[-1:] + match.string[match.end() :].lstrip()[:1]
    return len(lower) > 4 or not set(neighbours) & set("+-*/^<>")


def canonical(text: str) -> Words:
    """The words of a text in lower case and singular, without articles and full stops; units by name, powers as `square`."""
    words: list[str] = []
    for match in _TOKEN.finditer(text.replace(".", "").replace("'s", "")):
        token = match[0].lower()
        if token == "/":
            words.append("per")
        elif match[1] is not None:
            words.append({"2": "square", "3": "cubic", "-1": "per"}.get(match[1], f"power{match[1]}"))
        elif token in _SHORTHANDS:
            words += _SHORTHANDS[token]
        elif token not in _FILLERS:
            words.append(_CANONICAL.get(token) or _IRREGULAR.get(token) or _singular(token))
    return tuple(words)


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]
    return word


def take_magnitude(words: Words) -> tuple[int, Words]:
    """The factor with which the words after a number begin (`million dollars`), and the other words."""
    factor = 1
    while words and words[0] in _MAGNITUDES:
        factor *= _MAGNITUDES[words[0]]
        words = words[1:]
    return factor, words


def take_qualifier(text: str) -> str:
    r"""The text without a clause after a formula that says when it holds (`\text{ for all } x`)."""
    for match in re.finditer(rf"{TEXT_BEGIN}\s*([A-Za-z]+)|(?<=[\s,])([a-z]+)(?= )", text):
        head = text[: match.start()].strip(" ,(")
        if (match[1] or match[2]).lower() in _QUALIFIERS and re.search(r"[\w})\]]$", head) and not _MARKED.search(head):
            return head
    return text


def contradict(first: Words, second: Words) -> bool:
    """Whether the words have different meanings: other modifiers, or other units if both have some."""
    one, other = set(first), set(second)
    if (one ^ other) & _MODIFIERS or (one ^ other) & _MAGNITUDES.keys():
        return True
    if one and other and (one ^ other) & {"square", "cubic"}:
        return True
    return not (one <= other or other <= one)


def droppable(words: Words) -> bool:
    """Whether the words may be omitted: they are only units and names of things."""
    return not contradict(words, ())
