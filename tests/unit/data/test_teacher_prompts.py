"""The teacher reads a separate template over the row's columns instead of the student's prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.config import DataConfig, NamedTeacherConfig, TeacherPromptConfig, load_config
from kdrl_mcore.data.limits import check_teacher_prompts
from kdrl_mcore.data.prompts import TeacherPrompts, load_prompts
from kdrl_mcore.data.table import PromptTable
from kdrl_mcore.data.taught import teaches
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.rollout.files import read_rollouts, write_rollouts
from kdrl_mcore.types import Rollout
from tests.reference.tiny_models import make_qwen2
from tests.support.tokenizers import byte_level, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}"
)
ROWS = [{"prompt": "1+1=", "answer": "2", "why": "one {answer} more"}, {"prompt": "2+2=", "answer": "4", "why": None}]
DATA = DataConfig(columns=["why"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=TEMPLATE))


def load(
    folder: Path, tokenizer: Tokenizer, prompt: TeacherPromptConfig, data: DataConfig = DATA, rows: Any = ROWS, most: int = 99
) -> PromptTable:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = TeacherPrompts(prompt, "teacher.prompt", tokenizer, most, "teacher.prompt.max_tokens")
    return load_prompts(str(path), data, tokenizer, 64, teachers={"teacher": teacher}, long_prompts=data.long_prompts)


def read_by_teacher(table: PromptTable, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode_response(prompt.teacher_prompts["teacher"]) for prompt in table]


def test_the_template_has_the_row_and_is_filled_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompt = TeacherPromptConfig("chat", message_template="{prompt} {why} \\boxed{}", system_prompt="Known: {answer}")
    table = load(tmp_path, tokenizer, prompt)
    assert read_by_teacher(table, tokenizer) == [
        "<system>Known: 2<user>1+1= one {answer} more \\boxed{}<assistant>",
        "<system>Known: 4<user>2+2=  \\boxed{}<assistant>",
    ]
    assert [tokenizer.decode_response(each.token_ids) for each in table] == [
        "<user>1+1=<assistant>",
        "<user>2+2=<assistant>",
    ]
    shared = tmp_path / "table.arrow"
    table.write(shared)
    assert read_by_teacher(table.read(shared), tokenizer) == read_by_teacher(table, tokenizer)


def test_template_arguments_reach_both_templates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    thinks_not = ["enable_thinking=false"]
    table = load(tmp_path, tokenizer, TeacherPromptConfig("chat", template_arguments=thinks_not))
    assert read_by_teacher(table, tokenizer)[0] == "<user>1+1=<assistant><no>"
    assert tokenizer.decode_response(table[0].token_ids) == "<user>1+1=<assistant>"
    table = load(tmp_path, tokenizer, TeacherPromptConfig("plain"), replace(DATA, template_arguments=thinks_not))
    assert read_by_teacher(table, tokenizer)[0] == "1+1="
    assert tokenizer.decode_response(table[0].token_ids) == "<user>1+1=<assistant><no>"


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (TeacherPromptConfig("chat", message_template="{prompt} {reason}"), "{reason} is none of prompt, answer, why"),
        (TeacherPromptConfig("chat", message_template="{answer}"), "lacks {prompt}"),
        (TeacherPromptConfig("chat", template_arguments=["thinks=1"]), "does not ask for thinks: leave it out"),
        (TeacherPromptConfig("chat", template_arguments=["enable_thinking"]), "is not NAME=VALUE"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, prompt: TeacherPromptConfig, told: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, tokenizer, prompt)
    assert told in str(raised.value) and str(raised.value).startswith("teacher.prompt.")


def test_what_is_too_long_is_refused_or_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompt = TeacherPromptConfig("plain", plain_template="{prompt} {why}")
    with pytest.raises(DataError, match=r"row 1: what teacher reads has 2\d tokens, .* raise teacher.prompt.max_tokens"):
        load(tmp_path, tokenizer, prompt, most=10)
    table = load(tmp_path, tokenizer, prompt, replace(DATA, long_prompts="drop"), most=10)
    assert (len(table), table.dropped, table[0].prompt_id) == (1, 1, "rows-2")
    table = load(tmp_path, tokenizer, prompt)
    make_qwen2(tmp_path / "model", seed=1, vocab_size=300)
    config = load_config(
        [
            *("objective=kdrl", "objective.beta.init=1", f"student.path={tmp_path}/model", "teacher.weights=present"),
            *("teacher.prompt.template=plain", "rollout.max_response_tokens=480"),
        ]
    )
    check_teacher_prompts(table[1:], "rows", config)
    with pytest.raises(DataError, match=r"row 1: .* has 22 tokens, and with a response of 495 exceeds the 512 positions"):
        config.rollout.max_response_tokens = 495
        check_teacher_prompts(table, "rows", config)


def rollout(response: list[int]) -> Rollout:
    ids = np.array(response)
    prompts = {"teacher": np.array([1, 2, *range(100, 120)])}
    return Rollout("p", 0, np.array([1, 2]), ids, np.zeros(len(ids), np.float32), "stop", 0, teacher_prompts=prompts)


def test_what_the_teacher_reads_is_in_rollout_files(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.jsonl", [rollout([3])])
    (found,) = read_rollouts(tmp_path / "r.jsonl")
    assert found.teacher_prompts["teacher"].tolist() == [1, 2, *range(100, 120)]
    row = json.loads((tmp_path / "r.jsonl").read_text())
    for wrong in ([1], {"teacher": "x"}, {"teacher": []}, {"teacher": [-1]}):
        (tmp_path / "w.jsonl").write_text(json.dumps({**row, "teacher_prompts": wrong}) + "\n")
        with pytest.raises(DataError, match=r"line 1: 'teacher_prompts"):
            read_rollouts(tmp_path / "w.jsonl")


def test_one_of_several_teachers_has_prompts_only_for_the_rows_that_it_teaches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prompt = TeacherPromptConfig("plain", plain_template="{prompt}{answer}")

    def teacher(values: list[str], most: int) -> TeacherPrompts:
        reads = partial(teaches, NamedTeacherConfig(column="why", values=values))
        return TeacherPrompts(prompt, "teachers.x.prompt", tokenizer, most, "teachers.x.prompt.max_tokens", reads)

    readers = {"x": teacher(["one {answer} more"], 5), "y": teacher(["nothing"], 1)}  # y's limit is below every prompt's length
    table = load_prompts(str(path), DATA, tokenizer, 64, teachers=readers)
    assert [list(each.teacher_prompts) for each in table] == [["x"], []]
    with pytest.raises(
        DataError, match=r"what x reads has 5 tokens, but must have 1 to 4: raise teachers\.x\.prompt\.max_tokens"
    ):
        load_prompts(str(path), DATA, tokenizer, 64, teachers={"x": teacher(["one {answer} more"], 4)})
