"""Files of rows are found by their literal names and read as written; an error names the file and the damaged line."""

from __future__ import annotations

import datetime
import gzip
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdrl_mcore.config import DataConfig
from kdrl_mcore.data.prompts import load_prompts
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import DataError
from tests.support.tokenizers import byte_level, save_tokenizer

ROW = b'{"prompt": "q", "answer": "1"}\n'
PLAIN = DataConfig(template="plain")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("plain"), byte_level()))


def answers_of(path: Path | str, tokenizer: Tokenizer, data: DataConfig = PLAIN) -> list[str]:
    return [prompt.answer for prompt in load_prompts(str(path), data, tokenizer, 64)]


def refusal_of(path: Path | str, tokenizer: Tokenizer) -> str:
    """The one line of the error, without the folder."""
    with pytest.raises(DataError) as caught:
        load_prompts(str(path), PLAIN, tokenizer, 64)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{Path(path).parent}/", "")


@pytest.mark.parametrize(
    "name",
    [
        *("data[1].jsonl", "data*.jsonl", "data?.jsonl", "**.jsonl", "{data1,b}.jsonl", "data[!2].jsonl", "~.jsonl"),
        *("a::b.jsonl", "hf:x.jsonl", "%41#.jsonl", "data[1].parquet", "*.parquet", "data[1].json"),
    ],
)
def test_a_name_is_no_pattern(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = {"prompt": ["q"], "answer": ["other"]}
    for other in ("data1.jsonl", "data1.json"):
        (tmp_path / other).write_text(json.dumps({"prompt": "q", "answer": "other"}))
    pq.write_table(pa.table(table), tmp_path / "data1.parquet")
    if name.endswith(".parquet"):
        pq.write_table(pa.table(table | {"answer": ["1"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(ROW)
    assert answers_of(tmp_path / name, tokenizer) == ["1"]


def test_an_address_is_a_file_where_there_is_one(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:").mkdir()
    (tmp_path / "hf:" / "x.jsonl").write_bytes(ROW)
    assert answers_of("hf://x.jsonl", tokenizer) == ["1"]
    assert "does not exist" in refusal_of("hf://y.jsonl", tokenizer)
    assert "~ is not expanded here" in refusal_of("~/y.jsonl", tokenizer)


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ('{"prompt": "q", "answer": 9007199254740993}', ["9007199254740993"]),
        ('{"prompt": "q", "answer": 123456789012345678901234567890}', ["123456789012345678901234567890"]),
        ('{"prompt": "q", "answer": 0.10}', ["0.10"]),
        ('{"prompt": "q", "answer": 1.0}\n{"prompt": "q", "answer": "1.0"}', ["1", "1.0"]),
        ('{"prompt": "q", "answer": 0.1234567890123456789}', ["0.1234567890123456789"]),
        ('{"prompt": "q", "answer": 1e-7}\n{"prompt": "q", "answer": 1e400}', ["1e-7", "1e400"]),
        ('{"prompt": "q", "answer": [0.10, 2]}', ["0.10, 2"]),
        ('{"prompt": "q", "answer": "2024-01-02"}\n{"prompt": "q", "answer": "2024-01-02T00:00:00Z"}', None),
        ('{"prompt": "q", "answer": 1}\n{"prompt": "q", "answer": "x"}\n{"prompt": "q", "answer": [1, 2]}', ["1", "x", "1, 2"]),
        ('{"prompt": "a\u2028b\u0085", "answer": "1"}', ["1"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_values_keep_what_they_are_written_with(
    written: str, answers: list[str] | None, suffix: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(written, encoding="utf-8")
    expected = [json.loads(line)["answer"] for line in written.split("\n")] if answers is None else answers
    assert answers_of(path, tokenizer) == expected


def test_other_columns_may_change_their_type_anywhere(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    early = b'{"prompt": "q", "answer": "1", "meta": 1, "more": "' + b"y" * 400 + b'"}\n'
    path.write_bytes(early * 3000 + b'{"prompt": "q", "answer": "2", "meta": {"a": ["b"]}, "more": null}\n')
    assert answers_of(path, tokenizer)[-2:] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda rows: rows.replace(b"\n", b"\r\n"), 2),
        (lambda rows: b"\xef\xbb\xbf" + rows, 2),
        (lambda rows: b"\n \n" + rows + b"\n", 2),
        (lambda rows: rows[:-1], 2),
        (lambda rows: b"\xef\xbb\xbf[\r\n" + rows[:-1].replace(b"\n", b",\r\n") + b"\r\n]\r\n", 2),
        (gzip.compress, 2),
        (lambda rows: gzip.compress(b"\xef\xbb\xbf" + rows.replace(b"\n", b"\r\n")), 2),
    ],
    ids=["crlf", "bom", "blank lines", "no last newline", "array", "gzip", "gzip, bom and crlf"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_forms_of_the_same_rows(
    change: Callable[[bytes], bytes], count: int, name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / name).write_bytes(change(ROW * 2))
    prompts = load_prompts(str(tmp_path / name), PLAIN, tokenizer, 64)
    assert [(prompt.prompt_id, prompt.text, prompt.answer) for prompt in prompts] == [("a-1", "q", "1"), ("a-2", "q", "1")]


DAMAGED: dict[str, tuple[bytes, str]] = {
    "latin-1": (ROW * 2 + '{"prompt": "é", "answer": "1"}\n'.encode("latin-1"), "a.jsonl line 3 is not UTF-8 text (byte 0xe9)"),
    "broken UTF-8": (ROW + b'{"prompt": "\xe2\x28\xa1"}\n' + ROW, "a.jsonl line 2 is not UTF-8 text (byte 0xe2)"),
    "UTF-16": ('{"prompt": "q"}\n'.encode("utf-16"), "a.jsonl is UTF-16 text: save it as UTF-8"),
    "UTF-16 without a mark": ('{"prompt": "q"}\n'.encode("utf-16-le"), "a.jsonl is UTF-16 text: save it as UTF-8"),
    "cut": (ROW + ROW[:-6], "a.jsonl line 2 is cut off"),
    "cut in a nested object": (ROW + b'{"prompt": "q", "x": {"a": 1}', "a.jsonl line 2 is cut off"),
    "cut in a character": (ROW + '{"prompt": "é'.encode()[:-1], "a.jsonl line 2 is cut off"),
    "zeros behind": (ROW + b"\x00" * 9, "a.jsonl line 2 is not JSON"),
    "trailing comma": (b'{"prompt": "q", "answer": "1",}\n', "a.jsonl line 1 is not JSON"),
    "comma after an object": (ROW[:-1] + b",\n" + ROW, "a.jsonl line 1 has text after its object: remove the comma"),
    "two in a line": (ROW[:-1] + ROW, "a.jsonl line 1 has text after its object: write one object per line"),
    "key twice": (ROW + b'{"prompt": "q", "answer": "1", "answer": "2"}\n', "line 2 cannot be read: the key 'answer' occurs"),
    "array": (ROW + b"[1, 2]\n", "a.jsonl line 2 is not a JSON object"),
    "text": (ROW + b'"q"\n', "a.jsonl line 2 is not a JSON object"),
    "over several lines": (
        b'{\n"prompt": "q"\n}\n',
        "a.jsonl line 1: each object must be on one line: rename the file to .json",
    ),
    "too deep": (b'{"x": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", "line 1 cannot be read: its lists or objects are nested"),
    "too long an integer": (b'{"x": ' + b"9" * 5000 + b"}\n", "line 1 cannot be read: an integer has more digits than"),
    "single quotes": (b"{'prompt': 'q'}\n", "a.jsonl line 1 is not JSON"),
    "only blank": (b"\n \n", "a.jsonl has no rows"),
    "half a character": (b'{"prompt": "\\ud800", "answer": "1"}\n', "a.jsonl row 1: 'prompt' is not valid UTF-8 text"),
    "line beside row": (b"\n\n" + ROW + b'{"prompt": "", "answer": "1"}\n', "a.jsonl row 2 (line 4): 'prompt' is empty"),
    "column missing": (ROW * 4 + b'{"prompt": "q"}\n', "a.jsonl row 5 has no column 'answer' (it has: prompt)"),
    "null": (ROW + b'{"prompt": "q", "answer": null}\n', "a.jsonl row 2: 'answer' is empty"),
    "not a number": (b'{"prompt": "q", "answer": NaN}\n', "a.jsonl row 1: 'answer' is nan, not text"),
    "false": (b'{"prompt": "q", "answer": false}\n', "a.jsonl row 1: 'answer' is False, not text"),
    "parquet": (b"PAR1", "a.jsonl is a parquet file: rename it to .parquet"),
    "a gzip file cut off": (
        gzip.compress(os.urandom(999).hex().encode())[:-20],
        "a.jsonl cannot be read: Compressed file ended",
    ),
    "an array cut off": (b"[" + ROW[:-1], "a.jsonl line 1 is cut off"),
    "an array cut off after a comma": (b"[" + ROW[:-1] + b",\n", "a.jsonl is cut off"),
    "an array with a last comma": (b"[" + ROW[:-1] + b",\n]", "a.jsonl line 1 is not JSON (a comma after the last item"),
    "text after an array": (b"[" + ROW + b"] x", "a.jsonl has text after its array"),
    "an item that is none": (b"[\n" + ROW + b",\n7]", "a.jsonl line 4 is not a JSON object"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=list(DAMAGED))
def test_damage_is_one_line_with_its_place(content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert message in refusal_of(tmp_path / "a.jsonl", tokenizer)


PARQUET: dict[str, tuple[Any, list[str]]] = {
    "64 bits": (pa.array([2**63 - 1, -(2**63)]), ["9223372036854775807", "-9223372036854775808"]),
    "unsigned": (pa.array([2**64 - 1, 0], pa.uint64()), ["18446744073709551615", "0"]),
    "float32": (pa.array([0.1, 27.0], pa.float32()), ["0.1", "27"]),
    "float16": (pa.array([0.1, 2.5], pa.float16()), ["0.1", "2.5"]),
    "decimals": (pa.array([Decimal("1.50"), Decimal("3.00")]), ["1.50", "3"]),
    "dates": (pa.array([datetime.date(2024, 1, 2)] * 2), ["2024-01-02"] * 2),
    "dictionary": (pa.array(["x", "x"]).dictionary_encode(), ["x", "x"]),
    "large text": (pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
    "bytes": (pa.array([b"x", b"\xc3\xa9"]), ["x", "é"]),
    "lists": (pa.array([["1", "2"], ["3"]]), ["1, 2", "3"]),
    "lists of float32": (pa.array([[0.1], [0.2]], pa.list_(pa.float32())), ["0.1", "0.2"]),
}


@pytest.mark.parametrize(("column", "answers"), PARQUET.values(), ids=list(PARQUET))
def test_columns_of_parquet(column: Any, answers: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = pa.array(["q", "q"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": prompts, "answer": column, "unused": pa.nulls(2)}), tmp_path / "a.parquet")
    assert answers_of(tmp_path / "a.parquet", tokenizer) == answers
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert answers_of(tmp_path / "b.parquet.gz", tokenizer) == answers


def test_row_groups_empty_and_damaged_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.parquet"
    numbers = [str(number) for number in range(5000)]
    pq.write_table(pa.table({"prompt": ["q"] * 5000, "answer": numbers}), path, row_group_size=999)
    assert answers_of(path, tokenizer) == numbers
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(300) + whole[500:])
    assert refusal_of(path, tokenizer).startswith("a.parquet cannot be read: ")
    path.write_bytes(whole[:-20])
    assert refusal_of(path, tokenizer).startswith("a.parquet cannot be read: ")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    assert refusal_of(path, tokenizer) == "a.parquet has no rows"
    pq.write_table(pa.table({"prompt": ["q"], "answer": [datetime.datetime(2024, 1, 2)]}), path)
    assert "row 1: 'answer' is datetime.datetime(2024, 1, 2, 0, 0), not text" in refusal_of(path, tokenizer)
    pq.write_table(pa.table({"prompt": ["q", None], "answer": ["1", "2"]}), path)
    assert "row 2: 'prompt' is empty" in refusal_of(path, tokenizer)


def test_a_large_file_takes_little_more_memory_than_its_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(4_000):
            file.write(json.dumps({"prompt": f"{number}", "answer": str(number), "unused": "y" * 1000}) + "\n")
    prompts = load_prompts(str(path), PLAIN, tokenizer, 64)
    assert len(prompts) == 4_000 and prompts.table.nbytes < 500_000
    assert (prompts[3_999].answer, prompts[-1].prompt_id, len(prompts[5:7]), prompts[5:7][1].text) == (
        "3999",
        "a-4000",
        2,
        "6",
    )
