"""Every configuration key with its default and meaning, read from `config/schema.py` itself: for `--help` and the docs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator

import yaml

from kdrl_mcore.config import CHOICES, Config

_COMMENT = re.compile(r"^    (\w+):.*?#\s*(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its dotted name, its default as YAML writes it, what it means, and its allowed values where it is a choice."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...]


def documented_keys() -> Iterator[Key]:
    """Every key, in the order of `config/schema.py`."""
    yield from _keys(Config(), "")


def help_text() -> str:
    """Every key with its default and meaning, one a line."""
    return "\n".join(_line(key) for key in documented_keys())


def markdown() -> str:
    """The same as Markdown tables, one for each group."""
    tables: dict[str, list[str]] = {}
    for key in documented_keys():
        rows = tables.setdefault(key.name.split(".")[0], [])
        meaning = key.meaning.replace("|", "\\|")
        rows.append(f"| `{key.name}` | `{key.default}` | {meaning}{_choices(key)} |")
    parts = [f"### {group}\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) for group, rows in tables.items()]
    return "\n\n".join(parts) + "\n"


def _keys(node: object, prefix: str) -> Iterator[Key]:
    comments = dict(_COMMENT.findall(inspect.getsource(type(node))))
    for field in dataclasses.fields(typing.cast(typing.Any, node)):
        value, name = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{name}.")
        else:
            default = yaml.safe_dump(value).splitlines()[0]
            yield Key(name, default, comments.get(field.name, ""), CHOICES.get(name, ()))
            for element in typing.get_args(typing.get_type_hints(type(node))[field.name]):
                if dataclasses.is_dataclass(element):  # a list of them
                    yield from _keys(typing.cast(typing.Any, element)(), f"{name}[].")


def _line(key: Key) -> str:
    text = f"{key.name}={key.default}"
    return f"{text:<52} {key.meaning}{_choices(key)}".rstrip()


def _choices(key: Key) -> str:
    named = all(re.search(rf"\b{re.escape(choice)}\b", key.meaning) for choice in key.choices)
    return "" if named else f" [{', '.join(key.choices)}]"
