"""Which of several teachers teach a prompt, by a column of the data, and how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdrl_mcore.config import Config, NamedTeacherConfig
from kdrl_mcore.config.derived import DOMAIN, has_several_teachers, section_of
from kdrl_mcore.errors import DataError


class HasColumns(Protocol):
    """A prompt, or a response to one."""

    @property
    def domain(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


def value_of(item: HasColumns, column: str) -> str | None:
    """The value of a column as text; None if the item has no such value. `DOMAIN` is the prompt's domain, unless the data have
    a column of this name."""
    value = item.columns.get(column)
    if value is None and column == DOMAIN:
        return item.domain
    return None if value is None else str(value)


def teaches(teacher: NamedTeacherConfig, item: HasColumns) -> bool:
    """Whether a teacher teaches this prompt."""
    return not teacher.values or value_of(item, teacher.column) in teacher.values


@dataclass
class Taught:
    """The prompts of a data set that each teacher teaches.

    Attributes:
        prompts: by the teacher's name.
        by_none: prompts without a teacher.
        by_several: prompts with more than one.
    """

    prompts: dict[str, int]
    by_none: int = 0
    by_several: int = 0


def count_taught(config: Config, items: Iterable[HasColumns]) -> Taught:
    """Count the prompts of `teachers`.

    Raises:
        DataError: a value of a teacher occurs in no prompt.
    """
    taught, seen = Taught(dict.fromkeys(config.teachers, 0)), {each.column: set[str]() for each in config.teachers.values()}
    for item in items:
        names = [name for name, teacher in config.teachers.items() if teaches(teacher, item)]
        for name in names:
            taught.prompts[name] += 1
        taught.by_none += not names
        taught.by_several += len(names) > 1
        for column, values in seen.items():
            if (value := value_of(item, column)) is not None:
                values.add(value)
    for name, teacher in config.teachers.items():
        for value in teacher.values:
            if value not in seen[teacher.column]:
                there = ", ".join(repr(each) for each in sorted(seen[teacher.column])[:10]) or "none"
                raise DataError(
                    f"{section_of(config, name)}.values: no prompt has {value!r} in the column {teacher.column}; there are: "
                    f"{there}"
                )
    return taught


def describe_taught(config: Config, datasets: Sequence[Iterable[HasColumns]]) -> list[str]:
    """Lines for the log: how many prompts each of several teachers teaches, and how many have none; empty for one teacher.

    Raises:
        DataError: a value of a teacher occurs in no prompt.
    """
    if not has_several_teachers(config):
        return []
    taught = count_taught(config, (item for items in datasets for item in items))
    counted = ", ".join(f"{name} {count}" for name, count in taught.prompts.items())
    several = f"; {taught.by_several} by several" if taught.by_several else ""
    none = f"; {taught.by_none} by none: these are not distilled" if taught.by_none else ""
    return [f"prompts taught by each teacher: {counted}{several}{none}"]
