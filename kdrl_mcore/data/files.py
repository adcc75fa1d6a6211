"""Rows of data sets: JSON lines, JSON documents and parquet files (each also gzipped), and hub ids.

File names are taken literally: no character has a special meaning. JSON is read as it is written, row by row: the type of a
value does not depend on the rows before it, integers keep all their digits, and fractions keep the digits that they are
written with. From parquet files and hub data sets only the wanted columns are read.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import cast

from kdrl_mcore.config import without_revision
from kdrl_mcore.data.arrow_rows import hub_rows, parquet_rows
from kdrl_mcore.data.json_rows import BOM, document_rows, line_rows
from kdrl_mcore.data.rows import Row, one_line
from kdrl_mcore.errors import DataError

KINDS = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@\w[\w./-]*)?")
_GZIP, _PARQUET, _UTF16 = b"\x1f\x8b", b"PAR1", (b"\xff\xfe", b"\xfe\xff")


def is_file(source: str) -> bool:
    """Whether a data set's name is a file name, whether or not the file exists, rather than a hub id."""
    return _kind(source) is not None or Path(source).exists()


def name_of(source: str) -> str:
    """The short name of a data set: its file name or hub id without folders, suffix and revision."""
    return Path(without_revision(source).removesuffix(".gz")).stem


def read_rows(source: str, wanted: Sequence[str], split: str, subset: str | None) -> Iterator[Row]:
    """Every row of a data set, in order.

    Args:
        source: a `.jsonl`, `.json` or `.parquet` file (also `.gz`), or a hub id, `org/name` or `org/name@revision`.
        wanted: the columns to read; the rows may lack all others.
        split, subset: which part of a hub data set to read.

    Raises:
        DataError: there is no such file or data set, or it cannot be read; the message names the line of the file.
    """
    path = Path(source)
    kinds = ", ".join(KINDS)
    kind = _kind(source)
    if path.is_file() and kind:
        return _read_file(path, source, kind, wanted)
    if path.exists():
        raise DataError(f"{source} is not a {kinds} file: name one, or the id of a data set on the hub")
    if kind or not _HUB_ID.fullmatch(source):
        home = "; ~ is not expanded here: write the whole path" if source.startswith("~") else ""
        raise DataError(f"{source} does not exist: name a {kinds} file, or the id of a data set on the hub{home}")
    return hub_rows(source, wanted, split, subset)


def _kind(source: str) -> str | None:
    suffix = Path(source.removesuffix(".gz")).suffix
    return suffix if suffix in KINDS else None


def _read_file(path: Path, source: str, kind: str, wanted: Sequence[str]) -> Iterator[Row]:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty")
        with path.open("rb") as file:
            zipped = file.peek(2).startswith(_GZIP)
            stream = BufferedReader(cast(RawIOBase, gzip.GzipFile(fileobj=file))) if zipped else file
            head = stream.peek(4096)
            if kind == ".parquet":
                yield from parquet_rows(BytesIO(stream.read()) if zipped else stream, source, wanted)
            elif head.startswith(_PARQUET):
                raise DataError(f"{source} is a parquet file: rename it to .parquet")
            elif head.startswith(_UTF16) or b"\0" in head[:4]:
                raise DataError(f"{source} is UTF-16 text: save it as UTF-8")
            elif kind == ".json" or head.removeprefix(BOM).lstrip().startswith(b"["):
                yield from document_rows(stream, source)
            else:
                yield from line_rows(stream, source)
    except (OSError, EOFError, zlib.error) as error:  # no permission, a damaged disk, a truncated gzip file
        raise DataError(f"{source} cannot be read: {one_line(error)}") from error
