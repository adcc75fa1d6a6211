"""How `config/schema.py` declares a key: its default, its meaning and its allowed values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from kdrl_mcore.config.ranges import Range

T = TypeVar("T")
_META = "key"


@dataclasses.dataclass(frozen=True)
class Meta:
    """A key's meaning; its allowed values if it is a choice, and whether it may also be MODULE:NAME, a user's function;
    its range if it is a number (for a list, that of each item)."""

    meaning: str
    choices: tuple[str, ...]
    range: Range | None
    takes_functions: bool = False


def key(
    default: T, meaning: str, *, choices: Sequence[str] = (), range: Range | None = None, takes_functions: bool = False
) -> T:
    """A dataclass field with this default and a `Meta`. Like `dataclasses.field`, it is typed as its default."""
    metadata = {_META: Meta(meaning, tuple(choices), range, takes_functions)}
    made: Any
    if isinstance(default, (list, dict)):
        made = dataclasses.field(default_factory=default.copy, metadata=metadata)
    else:
        made = dataclasses.field(default=default, metadata=metadata)
    return made


def meta_of(field: dataclasses.Field[Any]) -> Meta | None:
    """The `Meta` of a field made by `key`; None for a section, which contains keys itself."""
    return field.metadata.get(_META)
