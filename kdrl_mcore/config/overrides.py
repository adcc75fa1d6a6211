"""Overrides on the command line, `key=value` and `group=choice`. Each is parsed with Hydra's grammar and applied separately, so
that an error can name the word that caused it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from kdrl_mcore.config.keys import MAPPINGS, general_name, key_types, nearest, sections
from kdrl_mcore.errors import ConfigError

KEY_TYPES = key_types()
SECTIONS = sections(KEY_TYPES)
_PLAIN = [name for name in KEY_TYPES if "[]" not in name]
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclass(frozen=True)
class Override:
    """One word of the command line: the key or group, and its value as parsed by Hydra."""

    word: str
    name: str
    value: Any


def override(name: str, value: str) -> str:
    """The override that sets a key to this text, with any characters quoted."""
    return f"{name}={QuotedString(value, Quote.double).with_quotes()}"


def read_overrides(words: Sequence[str], groups: Sequence[str]) -> list[Override]:
    """Parse each word. Hydra's leading `+` and `++` are accepted and ignored, since the schema is fixed.

    Args:
        groups: the names that take a choice.

    Raises:
        ConfigError: a word is not an override, names neither a key nor a group, or its value cannot be parsed.
    """
    for word in words:
        _check_name(word, groups)
    return [_read(word) for word in words]


def _check_name(word: str, groups: Sequence[str]) -> None:
    shown = _shown(word)
    if word.startswith("~"):
        raise ConfigError(f"{shown}: nothing can be left out of the configuration: set a value (key=value, or group=choice)")
    if word.startswith("-"):
        raise ConfigError(f"{shown} is not an option here: see --help")
    if not word.partition("=")[1] or not name_of(word):
        raise ConfigError(
            f"'{shown}' is not an override: write key=value or group=choice (a value with spaces in quotes, within the "
            f"shell's: {shlex.quote(override('key', f'... {word}'))})"
        )
    name = name_of(word)
    if name == "hydra.searchpath" or name in groups:
        return
    if name.split(".")[0] == "hydra" or name.startswith("hydra/"):
        raise ConfigError(f"{shown}: of Hydra's own keys only hydra.searchpath is used here (or --config-dir DIR)")
    check_key(name, groups)


def name_of(word: str) -> str:
    """The part before the first `=`."""
    return word.lstrip("+").split("=", 1)[0]


def check_key(name: str, groups: Sequence[str] = (), where: str = "") -> None:
    """Raise ConfigError, which names the nearest key, for a name that is neither a key nor a section.

    Args:
        where: the beginning of the message, such as the file that contains the name.
    """
    general = ".".join(part for part in general_name(name).split(".") if not part.isdigit())  # a list's items by number
    if general in _PLAIN or general_name(name) in SECTIONS or general.replace("terms.", "terms[].") in KEY_TYPES:
        return
    near = nearest(name, [*_PLAIN, *SECTIONS, *groups])
    own = "" if near or "." in name or where else "; name the folder of a group of your own with --config-dir DIR"
    raise ConfigError(f"{where}unknown configuration key '{_shown(name)}'{near}{own}")


def _read(word: str) -> Override:
    name, text = name_of(word), word.split("=", 1)[1]
    try:
        parsed = OverridesParser.create().parse_override(_with_letters_quoted(name, text))
    except HydraException as error:
        cause = f"the value cannot be parsed ({str(error).splitlines()[0]})"
        raise ConfigError(f"{_shown(word)}: {cause}: {_quote_it(name, text)}") from error
    if parsed.is_sweep_override():
        types = KEY_TYPES.get(general_name(name), ())
        advice = (
            f"a list is written in brackets: {_in_shell(f'{name}=[{text}]')}"
            if list in types
            else f"if it is a text, {_quote_it(name, text)}"
            if str in types
            else "kdrl-study runs through many"
        )
        raise ConfigError(f"{_shown(word)}: this key takes one value, not several to choose from: {advice}")
    value = parsed.value()
    return Override(word, name, text.strip() if _is_text(name) and _is_number(value) else value)


def _is_text(name: str) -> bool:
    """Whether a key's value is a text, never a number."""
    types = KEY_TYPES.get(general_name(name), ())
    return str in types and not {int, float, bool} & set(types)


def _is_number(value: Any) -> bool:
    """Whether a value was read as a number or a boolean. Turned into a text again, 2026.10 would become 2026.1."""
    return isinstance(value, (bool, int, float))


def _with_letters_quoted(name: str, text: str) -> str:
    """The override, its value in quotes if it is plain text with letters beyond ASCII, as in `/home/jörg/läufe`, which Hydra's
    grammar does not know."""
    if not text.isascii() and re.fullmatch(r"[\w/.:+@%\- ]+", text):
        return override(name, text.strip())
    return f"{name}={text}"


def apply(config: DictConfig, name: str, value: Any, word: str) -> None:
    """Set one key, or the keys of a section.

    Args:
        word: the beginning of an error message.

    Raises:
        ConfigError: the value does not have the key's type, or contains an unknown key.
    """
    general = general_name(name)
    if general in SECTIONS:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{_shown(word)}: '{name}' is a section, which takes no value itself: set {name}.KEY=value")
        for key, inner in value.items():
            check_key(f"{name}.{key}", where=f"{_shown(word)}: ")
            apply(config, f"{name}.{key}", inner, word)
        return
    types = KEY_TYPES.get(general, ())
    if value is None and types and type(None) not in types:
        raise ConfigError(f"{_shown(word)}: this key needs a value")
    if str in types and isinstance(value, (dict, list)):
        raise ConfigError(f"{_shown(word)}: this key takes a string: {_quote_it(name, word.split('=', 1)[-1])}")
    if _is_text(name) and _is_number(value):
        raise ConfigError(f"{_shown(word)}: this key takes a text: write it in quotes")
    if list in types and isinstance(value, str):
        raise ConfigError(f"{_shown(word)}: this key takes a list: write {_in_shell(f'{name}=[{value}]')}")
    try:
        _add_item(config, name)
        OmegaConf.update(config, name, value, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{_shown(word)}: {first_line(error)}") from error


def _add_item(config: DictConfig, name: str) -> None:
    """Add the item of a mapping that a key belongs to, with its defaults, if there is none of this name yet."""
    section, *rest = name.split(".")
    if section in MAPPINGS and rest[0] not in config[section]:
        if not rest[0].isidentifier():
            raise ValueError(f"{section}.{rest[0]}: a name consists of letters, digits and _")
        with open_dict(config):
            config[section][rest[0]] = OmegaConf.structured(MAPPINGS[section])


def first_line(error: Exception) -> str:
    """The first line of an OmegaConf error, without those about its own types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, GrammarParseError):
        text += " in a text with ${...}, which refers to another key: write \\${ for these characters themselves"
    return text


def _quote_it(name: str, text: str) -> str:
    advice = f"quote it within the shell's quotes, {_in_shell(override(name, text))}"
    return f"{advice}; the shell does not replace ~ after a key, but does replace $HOME" if text.startswith("~") else advice


def _in_shell(word: str) -> str:
    """A word quoted for bash, on one line."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_one_line(escaped)}'"


def _shown(word: str) -> str:
    """A word of the command line on one line, shortened if long."""
    text = _one_line(word)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _one_line(text: str) -> str:
    return "".join(each if each.isprintable() else _ESCAPES.get(each, f"\\u{ord(each):04x}") for each in text)
