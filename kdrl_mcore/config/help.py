"""All configuration keys with their defaults and meanings, from `config/schema.py`, for `--help` and the docs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import yaml

from kdrl_mcore.config.key import Meta
from kdrl_mcore.config.keys import described
from kdrl_mcore.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its dotted name, its default as YAML, and its meaning."""

    name: str
    default: str
    meta: Meta


def documented_keys() -> Iterator[Key]:
    """All keys, in the order of `config/schema.py`."""
    for name, value, meta in described(Config()):
        yield Key(name, yaml.safe_dump(value, default_flow_style=True).splitlines()[0], meta)


def help_text() -> str:
    """All keys with their defaults and meanings, one per line."""
    return "\n".join(_line(key) for key in documented_keys())


def markdown() -> str:
    """All keys as Markdown tables, one for each group."""
    tables: dict[str, list[str]] = {}
    for key in documented_keys():
        rows = tables.setdefault(key.name.split(".")[0], [])
        meaning = key.meta.meaning.replace("|", "\\|")
        bounds = "" if key.meta.range is None else key.meta.range.interval
        rows.append(f"| `{key.name}` | `{key.default}` | {bounds} | {meaning}{_choices(key)} |")
    head = "| key | default | range | meaning |\n|---|---|---|---|\n"
    parts = [f"### {group}\n\n{head}" + "\n".join(rows) for group, rows in tables.items()]
    return "\n\n".join(parts) + "\n"


def _line(key: Key) -> str:
    text = f"{key.name}={key.default}"
    bounds = "" if key.meta.range is None else f" {key.meta.range.interval}"
    return f"{text:<52} {key.meta.meaning}{_choices(key)}{bounds}".rstrip()


def _choices(key: Key) -> str:
    named = all(re.search(rf"\b{re.escape(choice)}\b", key.meta.meaning) for choice in key.meta.choices)
    return "" if named else f" [{', '.join(key.meta.choices)}]"
