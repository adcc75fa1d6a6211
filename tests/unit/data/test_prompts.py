"""Loading prompts: formats, templates, and one clear line for each thing that can be wrong with the data."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdrl_mcore.config import DataConfig
from kdrl_mcore.data.prompts import describe_prompt, load_prompts
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from tests.support.tokenizers import CHAT_TEMPLATE, END, byte_level, chat_model, save_tokenizer

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+\n2=\u2028", "answer": "4"}]
PLAIN = DataConfig(template="plain")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=CHAT_TEMPLATE))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_of(tokenizer: Tokenizer, token_ids: Any) -> str:
    return tokenizer.decode_response(token_ids)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_file_format_gives_the_same_prompts(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    path = tmp_path / f"sums{suffix}"
    if suffix == ".jsonl":
        write(path, ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    prompts = load_prompts(str(path), PLAIN, tokenizer, 64)
    assert [(p.prompt_id, p.text, p.answer, p.target) for p in prompts] == [
        ("sums-1", "1+1=", "2", None),
        ("sums-2", "2+\n2=\u2028", "4", None),
    ]
    assert [text_of(tokenizer, p.token_ids) for p in prompts] == [row["prompt"] for row in ROWS]


def test_chat_template_with_system_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    (with_system,) = load_prompts(path, DataConfig(system_prompt="Think."), tokenizer, 64)
    (without,) = load_prompts(path, DataConfig(), tokenizer, 64)
    assert with_system.text == "<system>Think.\n<user>1+1=\n<assistant>"
    assert without.text == "<user>1+1=\n<assistant>"
    assert text_of(tokenizer, without.token_ids) == without.text


@pytest.mark.parametrize(
    "template", ["{{ strftime_now('%d %b %Y') }}|", "{% set day = strftime_now('%Y-%m-%d %H:%M') %}{{ day }}|"]
)
def test_a_template_that_asks_for_the_date_is_told_a_fixed_one(tmp_path: Path, template: str) -> None:
    """Llama 3's template contains the date: with the true date, no evaluation could be continued on the next day."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "dated", byte_level(), chat_template=template + CHAT_TEMPLATE))
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    default, other = (
        load_prompts(path, data, tokenizer, 64)[0].text for data in (DataConfig(), DataConfig(chat_date="2031-02-03"))
    )
    assert default.split("|")[0] in ("26 Jul 2024", "2024-07-26 00:00")
    assert other.split("|")[0] in ("03 Feb 2031", "2031-02-03 00:00")
    for wrong in ("today", "26 Jul 2024", "2024-13-01", ""):
        with pytest.raises(ConfigError, match=rf"data\.chat_date={wrong} is not a date"):
            load_prompts(path, DataConfig(chat_date=wrong), tokenizer, 64)


def test_plain_template_may_hold_braces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Sum {1,2}?", "answer": "3"}])
    data = DataConfig(template="plain", plain_template="{prompt}\nEnd with \\boxed{}.\n")
    (prompt,) = load_prompts(path, data, tokenizer, 64)
    assert prompt.text == "Sum {1,2}?\nEnd with \\boxed{}.\n"


def test_column_names_come_from_the_configuration(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "1+1=", "gold": 2, "prompt": 0}])
    (prompt,) = load_prompts(path, DataConfig(template="plain", prompt_key="question", answer_key="gold"), tokenizer, 64)
    assert (prompt.text, prompt.answer) == ("1+1=", "2")


def test_targets_end_as_the_chat_template_ends_a_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model(tmp_path))
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "response": "2"}])
    (prompt,) = load_prompts(path, DataConfig(), tokenizer, 64, with_targets=True, needs_answers=False)
    assert prompt.target is not None and tokenizer.show(prompt.target) == "'2<|turn|>'"
    assert describe_prompt(prompt, tokenizer).endswith(r"tokens: '<s><|user|>1+1=<|turn|>\n<|assistant|>'")
    (prompt,) = load_prompts(path, PLAIN, tokenizer, 64, with_targets=True, needs_answers=False)
    assert prompt.target is not None and tokenizer.show(prompt.target) == f"'2{END}'"


def test_targets_end_with_the_end_of_sequence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "response": "it is\n2"}])
    (prompt,) = load_prompts(path, PLAIN, tokenizer, 64, with_targets=True, needs_answers=False)
    assert prompt.target is not None and prompt.target[-1] == tokenizer.eos_id
    assert text_of(tokenizer, prompt.target[:-1]) == "it is\n2"
    assert (str(prompt.target.dtype), prompt.answer) == ("int64", "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x", "answer": "1"}], r"has no column 'prompt' \(it has: question, answer\): set data\.prompt_key"),
        ([{"prompt": "x", "gold": "1"}], r"has no column 'answer' \(it has: prompt, gold\): set data\.answer_key"),
        ([{"prompt": "x", "answer": "1"}, {"prompt": "x"}], r"row 2 has no column 'answer' \(it has: prompt\)"),
        ([{"prompt": "x", "answer": " "}], "row 1: 'answer' is empty"),
        ([{"prompt": "", "answer": "1"}], "row 1: 'prompt' is empty"),
        ([{"prompt": "x", "answer": {"value": 1}}], "row 1: 'answer' is {'value': 1}, not text"),
        ([{"prompt": "x", "answer": True}], "row 1: 'answer' is True, not text"),
        ([{"prompt": "x", "answer": []}], r"row 1: 'answer' is \[\], not text"),
        ([{"prompt": 7, "answer": "1"}], "row 1: 'prompt' is 7, not text"),
        (
            [{"prompt": "x", "answer": "1"}, {"prompt": "y" * 65, "answer": "1"}],
            "row 2: the prompt has 65 tokens, but must have 1 to 64",
        ),
    ],
)
def test_a_bad_row_or_column_is_named(tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(write(tmp_path / "a.jsonl", rows), PLAIN, tokenizer, 64)
    assert "\n" not in str(caught.value) and "a.jsonl" in str(caught.value)


def test_numbers_and_lists_of_them_are_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for answer, text in ((0.5, "0.5"), (3.0, "3"), ([1, 2], "1, 2")):
        path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": answer}])
        assert [prompt.answer for prompt in load_prompts(path, PLAIN, tokenizer, 64)] == [text]


def test_text_and_integer_answers_may_be_mixed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": "1/2"}, {"prompt": "y", "answer": 2}])
    assert [prompt.answer for prompt in load_prompts(path, PLAIN, tokenizer, 64)] == ["1/2", "2"]


def test_whole_numbers_and_lists_of_answers_are_written_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for answer, text in ((27.0, "27"), (["$1$", "2"], "$1$, 2")):
        path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": answer}])
        assert [prompt.answer for prompt in load_prompts(path, PLAIN, tokenizer, 64)] == [text]


def test_a_context_stands_before_its_problem(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "x?", "answer": "1", "context": "let x=1"}, {"prompt": "y?", "answer": "2", "context": None}]
    prompts = load_prompts(
        write(tmp_path / "a.jsonl", rows), DataConfig(template="plain", context_key="context"), tokenizer, 64
    )
    assert [prompt.text for prompt in prompts] == ["let x=1\nx?", "y?"]


def test_the_users_message_has_a_template_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    (prompt,) = load_prompts(path, DataConfig(message_template="{prompt}\nBox it."), tokenizer, 64)
    assert prompt.text == "<user>1+1=\nBox it.\n<assistant>"


def test_a_response_beside_a_prompt_to_sample_leaves_the_answer_required(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="has no column 'answer'"):
        load_prompts(write(tmp_path / "a.jsonl", [{"prompt": "x", "response": "y"}]), PLAIN, tokenizer, 64, with_targets=True)


def test_a_missing_response_column_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"has no column 'response' \(it has: prompt, answer\): set data\.response_key"):
        load_prompts(write(tmp_path / "a.jsonl", ROWS), PLAIN, tokenizer, 64, with_targets=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl does not exist: name a .jsonl, .json, .parquet file"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("none.json", "[]", "none.json has no rows"),
        ("cut.jsonl", '{"prompt": "x", "answer": "1"}\n{"prompt": "y', "cut.jsonl line 2 is cut off: the file is incomplete"),
        ("bad.parquet", "PAR1", "bad.parquet cannot be read"),
        ("list.txt", "x", "list.txt is not a .jsonl, .json, .parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(str(tmp_path / name), PLAIN, tokenizer, 64)
    assert "\n" not in str(caught.value)


def test_a_path_without_a_file_is_not_taken_for_a_hub_id(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^data/sets/train does not exist"):
        load_prompts("data/sets/train", PLAIN, tokenizer, 64)


def test_an_empty_data_set_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "none.parquet"
    datasets.Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(path)
    with pytest.raises(DataError, match="has no rows"):
        load_prompts(str(path), PLAIN, tokenizer, 64)


def test_a_hub_data_set_is_read_with_its_split(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def hub(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if split == "dev":
            raise ValueError('Unknown split "dev".\nShould be one of ["test"].')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    prompts = load_prompts("owner/sums", DataConfig(template="plain", split="test", subset="en"), tokenizer, 64)
    assert ([prompt.prompt_id for prompt in prompts], asked) == (["sums-1", "sums-2"], [("owner/sums", "en", "test")])
    with pytest.raises(DataError, match=r'owner/sums .*split dev.* cannot be read: Unknown split "dev"\. Should be'):
        load_prompts("owner/sums", DataConfig(template="plain", split="dev"), tokenizer, 64)


def test_a_template_that_cannot_be_used_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    plain_only = load_tokenizer(save_tokenizer(tmp_path / "plain", byte_level()))
    with pytest.raises(DataError, match=r"has no chat template.*set data\.template=plain"):
        load_prompts(path, DataConfig(), plain_only, 64)
    refusing = load_tokenizer(save_tokenizer(tmp_path / "no", byte_level(), chat_template="{{ raise_exception('no system') }}"))
    with pytest.raises(DataError, match=r"rejects the prompt \(no system\)"):
        load_prompts(path, DataConfig(), refusing, 64)
    with pytest.raises(ConfigError, match=r"lacks \{prompt\}"):
        load_prompts(path, DataConfig(template="plain", plain_template="Q:"), tokenizer, 64)
    with pytest.raises(ConfigError, match=r"data\.system_prompt needs data\.template=chat"):
        load_prompts(path, DataConfig(template="plain", system_prompt="S"), tokenizer, 64)


def test_loading_is_quick_silent_and_leaves_no_cache(
    tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8000)])
    bars = datasets.are_progress_bars_disabled()
    begin = time.process_time()
    prompts = load_prompts(path, PLAIN, tokenizer, 64)
    assert time.process_time() - begin < 1.5
    assert len(prompts) == 8000
    assert capfd.readouterr() == ("", "")
    assert os.listdir(scratch) == []
    assert datasets.are_progress_bars_disabled() == bars


def test_a_changed_file_is_read_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    for answer in ("2", "3"):
        load = load_prompts(write(path, [{"prompt": "x", "answer": answer}]), PLAIN, tokenizer, 64)
        assert [prompt.answer for prompt in load] == [answer]
