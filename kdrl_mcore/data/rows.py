"""One row of a data set in any format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

MISSING: Any = object()
"""The value that `Row.get` returns for a column that the row lacks."""


class Row(NamedTuple):
    """One row: its number among the rows (from 1), its line in the file if it has one, and its values.

    `columns` are the names of all columns of the data set, including those that were not read."""

    number: int
    line: int | None
    values: dict[str, Any]
    columns: Iterable[str]

    @property
    def where(self) -> str:
        """`row 3`, with the line as well if blank lines make its number a different one."""
        return f"row {self.number}" + (f" (line {self.line})" if self.line not in (None, self.number) else "")

    def get(self, key: str) -> Any:
        """The value of a column. Without a column `a.b`, the key means b in the column a; `a.0` is the first item of a list."""
        if key in self.values:
            return self.values[key]
        value: Any = self.values
        for part in key.split("."):
            if isinstance(value, dict):
                value = value.get(part, MISSING)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return MISSING
        return value


def one_line(error: BaseException) -> str:
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
