"""Rows of parquet files and hub data sets: only the wanted columns are read, a few thousand rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kdrl_mcore.data.rows import Row, one_line
from kdrl_mcore.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

COMMIT = re.compile(r"[0-9a-f]{40}")
BATCH_ROWS = 4096
"""The number of rows in memory at once as Python values."""


def parquet_rows(stream: BinaryIO, source: str, wanted: Sequence[str]) -> Iterator[Row]:
    """The rows of a parquet file.

    Raises:
        DataError: it is damaged, or has a wanted column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=_top_level(names, wanted))
        yield from _arrow_rows(batches, names)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {one_line(error)}") from error


def _arrow_rows(batches: Iterable[pa.RecordBatch | pa.Table], names: Sequence[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        columns = {name: _values(batch.column(name)) for name in batch.schema.names}
        for index in range(batch.num_rows):
            number += 1
            yield Row(number, None, {name: values[index] for name, values in columns.items()}, names)


def _top_level(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The top-level columns that hold the wanted keys, in the data set's order."""
    tops = {key if key in names else key.split(".")[0] for key in wanted}
    return [name for name in names if name in tops]


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A column as Python values; floats of 32 and 16 bits become the shortest decimals that round to them."""
    values = column.to_pylist()
    return [_shorten(value, column.type) for value in values] if _has_small_floats(column.type) else values


def _has_small_floats(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return types.is_float32(kind) or types.is_float16(kind) or any(map(_has_small_floats, inner))


def _shorten(value: Any, kind: pa.DataType) -> Any:
    import numpy as np
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_float32(kind):
        return float(str(np.float32(value)))
    if types.is_float16(kind):
        return float(str(np.float16(value)))
    if isinstance(value, list) and kind.num_fields == 1:
        return [_shorten(each, kind.field(0).type) for each in value]
    if types.is_struct(kind):
        return {field.name: _shorten(value[field.name], field.type) for field in kind}
    return value


def hub_rows(source: str, wanted: Sequence[str], split: str, subset: str | None) -> Iterator[Row]:
    """The rows of a hub data set, `org/name` or `org/name@revision`.

    Raises:
        DataError: it cannot be loaded or read, for any reason.
    """
    import datasets  # its import takes a second, which runs that read files should not wait for

    name, _, revision = source.partition("@")
    pinned = {"revision": revision} if revision else {}
    with _quietly(f"{source} (no such file, so read as a hub id, split {split})"):
        table: datasets.Dataset = datasets.load_dataset(name, subset, split=split, **pinned)
        if revision:
            _check_commit(table, source, revision)
        names = table.column_names
        chosen = table.select_columns(_top_level(names, wanted)).with_format("arrow")
        yield from _arrow_rows(chosen.iter(batch_size=BATCH_ROWS), names)


def _check_commit(table: datasets.Dataset, source: str, revision: str) -> None:
    """Raise DataError if `datasets` could not reach the hub and has used another commit from its cache."""
    import datasets

    commit = next((Path(file["filename"]).parent.name for file in table.cache_files), "")
    if COMMIT.fullmatch(revision):
        if COMMIT.fullmatch(commit) and commit != revision:
            newest = f"the newest commit in the cache is {commit}"
            raise DataError(f"{source}: the hub cannot be reached, and {newest}: name that one")
    elif datasets.config.HF_HUB_OFFLINE:
        raise DataError(f"{source}: HF_HUB_OFFLINE is set, so name a commit, not a branch or tag: the cache holds {commit}")


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Read without progress bars and log lines (both are restored afterwards), and turn every error into one line."""
    import datasets

    bars_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each format's library raises its own
        raise DataError(f"{what} cannot be read: {one_line(error.__cause__ or error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_off:
            datasets.enable_progress_bars()
