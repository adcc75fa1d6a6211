"""Rows of JSON lines files and JSON documents, with their values as written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from kdrl_mcore.data.rows import Row, one_line
from kdrl_mcore.errors import DataError
from kdrl_mcore.reward.answers import WrittenFloat

BOM = b"\xef\xbb\xbf"
"""UTF-8's byte-order mark, with which a file may begin."""
_SPACE = re.compile(r"[ \t\r\n]*")


def line_rows(stream: BinaryIO, source: str) -> Iterator[Row]:
    """The objects of a JSON lines file, one in memory at a time."""
    number = 0
    for line, content in enumerate(stream, start=1):
        if line == 1:
            content = content.removeprefix(BOM)
        if not content.strip():
            continue
        number += 1
        ended = content.endswith(b"\n")
        place = f"{source} line {line}"
        text = _utf8(content, place, ended).strip()
        try:
            values = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            if text == "{":
                raise DataError(f"{place}: each object must be on one line: rename the file to .json") from error
            is_open = text.startswith("{") and not text.endswith("}")
            raise _refused(place, error, cut=not ended and (is_open or error.pos >= len(text))) from error
        except (_DuplicateKey, ValueError, RecursionError) as error:
            raise DataError(f"{place} cannot be read: {_why(error)}") from error
        if not isinstance(values, dict):
            raise _no_object(place)
        yield Row(number, line, values, values)


def document_rows(stream: BinaryIO, source: str) -> Iterator[Row]:
    """The objects of a JSON document, in an array or one after another. The whole text is in memory, and one object at a
    time."""
    text = _utf8(stream.read().removeprefix(BOM), source, ended=True)
    position = _skip(text, 0)
    is_array = text.startswith("[", position)
    position = _skip(text, position + is_array)
    number = 0
    while position < len(text) and not (is_array and text[position] == "]"):
        number += 1
        try:
            values, end = _DECODER.raw_decode(text, position)
            following = _skip(text, end)
            if is_array:
                following = _after_item(text, following)
        except json.JSONDecodeError as error:
            raise _refused(f"{source} line {error.lineno}", error, cut=error.pos >= len(text.rstrip())) from error
        except (_DuplicateKey, ValueError, RecursionError) as error:
            raise DataError(f"{source} {_line_of(text, position)} cannot be read: {_why(error)}") from error
        if not isinstance(values, dict):
            raise _no_object(f"{source} {_line_of(text, position)}")
        yield Row(number, None, values, values)
        position = following
    if is_array and (position >= len(text) or text[position + 1 :].strip()):
        what = (
            "has text after its array: remove it"
            if position < len(text)
            else "is cut off: the file is incomplete, write it again"
        )
        raise DataError(f"{source} {what}")


def _after_item(text: str, position: int) -> int:
    """The position of the next item or of the end of the array."""
    if not text.startswith((",", "]"), position):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if text.startswith("]", position):
        return position
    following = _skip(text, position + 1)
    if text.startswith("]", following):
        raise json.JSONDecodeError("a comma after the last item", text, position)
    return following


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _line_of(text: str, position: int) -> str:
    lines = text.count("\n", 0, position)
    return f"line {lines + 1}"


def _utf8(content: bytes, place: str, ended: bool) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if not ended and error.reason == "unexpected end of data":
            raise DataError(f"{place} is cut off: the file is incomplete, write it again") from error
        byte, before = content[error.start], content[: error.start]
        line = f" in line {before.count(10) + 1}" if b"\n" in before else ""
        raise DataError(
            f"{place} is not UTF-8 text (byte 0x{byte:02x}{line}): save the file as UTF-8 (iconv -f latin1 -t utf8)"
        ) from error


def _no_object(place: str) -> DataError:
    return DataError(f'{place} is not a JSON object: each row must be one, as {{"prompt": ..., "answer": ...}}')


def _refused(place: str, error: json.JSONDecodeError, cut: bool) -> DataError:
    if cut:
        return DataError(f"{place} is cut off: the file is incomplete, write it again")
    if error.msg == "Extra data":
        rest = error.doc[error.pos :].strip()
        hint = "remove the comma after the object" if rest == "," else "write one object per line"
        return DataError(f"{place} has text after its object: {hint}")
    return DataError(f"{place} is not JSON ({error.msg} at column {error.colno}): repair or remove it")


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its lists or objects are nested too deeply"
    return one_line(error) if isinstance(error, _DuplicateKey) else "an integer has more digits than Python reads (4300)"


class _DuplicateKey(Exception):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKey(f"the key '{twice}' occurs twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=WrittenFloat)
