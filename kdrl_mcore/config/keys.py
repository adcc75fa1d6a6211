"""All keys by name: their types, choices and ranges, and the key nearest to an unknown word."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from kdrl_mcore.config.key import Meta, meta_of
from kdrl_mcore.config.ranges import Range
from kdrl_mcore.config.schema import Config, NamedTeacherConfig


def key_types(schema: type = Config) -> dict[str, tuple[type, ...]]:
    """Every key of a schema and the types of its value, including `NoneType` if it may be null. The items of a list are
    `NAME[]`, the keys of its items `NAME[].KEY`; those of the items of a mapping are `SECTION.NAME.KEY`."""
    return dict(_types(schema, ""))


def _types(schema: type, prefix: str) -> Iterator[tuple[str, tuple[type, ...]]]:
    annotations = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield from _types_of(annotations[field.name], f"{prefix}{field.name}")


def _types_of(annotation: Any, name: str) -> Iterator[tuple[str, tuple[type, ...]]]:
    if dataclasses.is_dataclass(annotation):
        yield from _types(typing.cast(type, annotation), f"{name}.")
    elif typing.get_origin(annotation) is list:
        yield name, (list,)
        yield from _types_of(typing.get_args(annotation)[0], f"{name}[]")
    elif typing.get_origin(annotation) is dict:
        yield from _types_of(typing.get_args(annotation)[1], f"{name}.NAME")
    elif isinstance(annotation, types.UnionType):
        members = typing.get_args(annotation)
        yield name, tuple(typing.get_origin(member) or member for member in members)
        for member in members:
            if typing.get_origin(member) is list:
                yield from _types_of(typing.get_args(member)[0], f"{name}[]")
    else:
        yield name, (annotation,)


def described(node: object, prefix: str = "") -> Iterator[tuple[str, Any, Meta]]:
    """Every key below a dataclass with its value and its `Meta`, in the schema's order. A list or mapping of sections is
    followed by the keys of its items, `NAME[].KEY` or `SECTION.NAME.KEY`, with their defaults."""
    annotations = typing.get_type_hints(type(node))
    for field in dataclasses.fields(typing.cast(Any, node)):
        value, name, meta = getattr(node, field.name), f"{prefix}{field.name}", meta_of(field)
        if meta is None:
            yield from described(value, f"{name}.")
            continue
        yield name, value, meta
        for item in typing.get_args(annotations[field.name]):
            if dataclasses.is_dataclass(item):
                yield from described(typing.cast(Any, item)(), f"{name}.NAME." if isinstance(value, dict) else f"{name}[].")


CHOICES: dict[str, tuple[str, ...]] = {name: meta.choices for name, _, meta in described(Config()) if meta.choices}
"""The allowed values of every key that is a choice."""

TAKE_FUNCTIONS = frozenset(name for name, _, meta in described(Config()) if meta.takes_functions)
"""The choices that may also be MODULE:NAME, a user's function."""

RANGES: dict[str, Range] = {
    f"{name}[]" if isinstance(value, list) else name: meta.range
    for name, value, meta in described(Config())
    if meta.range is not None
}
"""The range of every numeric key; the items of a list are `NAME[]`, the keys of its items `NAME[].KEY`. It does not apply to
null, where a key allows it."""


MAPPINGS = {"teachers": NamedTeacherConfig}
"""The sections whose items have names of the user's choice, and the schema of an item."""


def general_name(name: str) -> str:
    """The name of a key in the schema: `teachers.NAME.path` for `teachers.maths.path`; any other name is returned unchanged."""
    section, *rest = name.split(".")
    return ".".join([section, "NAME", *rest[1:]]) if section in MAPPINGS and rest else name


def sections(keys: Iterable[str]) -> list[str]:
    """Every section that contains keys, such as `objective` and `objective.kd`."""
    parts = [key.split("[]")[0].split(".")[:-1] for key in keys]
    return sorted({".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)})


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean '...'?` with the nearest known name, or an empty text. A key's last part and its initials are compared by
    themselves: `lr` and `learning_rate` are near `optimizer.lr`. Keys in the word's own section are nearer than others."""
    known = list(known)
    last = _last(word)
    same = [name for name in known if _last(name) in (last, _initials(last)) or _initials(_last(name)) == last]
    section = {_last(name): name for name in known if "." in word and name.rpartition(".")[0] == word.rpartition(".")[0]}
    inside = [name for name in same if name in section.values()]
    alike = [section[part] for part in difflib.get_close_matches(last, section, n=1, cutoff=0.8)]
    found = inside or alike or same
    if len(found) != 1:
        found = difflib.get_close_matches(word, known, n=1, cutoff=0.4 if "." in word else 0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _initials(word: str) -> str:
    """The initials of a name, `lr` for `learning_rate`; empty for a single word."""
    parts = [part for part in word.split("_") if part]
    return "".join(part[0] for part in parts) if len(parts) > 1 else ""
