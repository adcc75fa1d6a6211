"""Ready column mappings: rows in the schema of the public sets give the problem, the answer and a verifier that accepts it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdrl_mcore.config import DataConfig, conf_dir, load_config
from kdrl_mcore.data.prompts import load_prompts
from kdrl_mcore.data.sources import read_domains
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.reward.answers import reference_answer
from tests.support.tokenizers import CHAT_TEMPLATE, byte_level, save_tokenizer

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\nFind x.\nIt is even.\n\nRemember to put your answer on "
    'its own line after "Answer:".'
)
PUBLISHED: dict[str, tuple[tuple[str, str | None, str], dict[str, Any], str, str]] = {
    "gsm8k": (
        ("openai/gsm8k", "main", "train"),
        {"question": "How many eggs?", "answer": "She has 3 * 10 = <<3*10=30>>30 eggs.\n#### 30"},
        "How many eggs?",
        "30",
    ),
    "math": (
        ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
        {"problem": "Find x.", "level": "Level 5", "solution": r"So $x=\boxed{\frac{1}{2}}$.", "type": "Algebra"},
        "Find x.",
        r"\frac{1}{2}",
    ),
    "dapo_math_17k": (
        ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"),
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        },
        "Find x.\nIt is even.",
        "34",
    ),
    "deepscaler": (
        ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
        {"problem": "Find x.", "answer": "-\\frac{2}{3}", "solution": "No."},
        "Find x.",
        "-\\frac{2}{3}",
    ),
    "skywork_or1": (
        ("Skywork/Skywork-OR1-RL-Data", None, "math"),
        {
            "data_source": "train-math-deepscaler",
            "prompt": [{"content": "Find x.", "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]', "style": "rule"},
            "extra_info": {"index": 7, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        },
        "Find x.",
        r"\frac{1}{2}",
    ),
    "openr1_math": (
        ("open-r1/OpenR1-Math-220k", "default", "train"),
        {"problem": "Find x.", "solution": "Long.", "answer": "180", "generations": ["<think>..", "b"], "uuid": "u"},
        "Find x.",
        "180",
    ),
    "mmlu": (
        ("cais/mmlu", "all", "auxiliary_train"),
        {"question": "Find the degree.", "subject": "abstract_algebra", "choices": ["0", "4", "2", "6"], "answer": 1},
        "Find the degree.\nA. 0\nB. 4\nC. 2\nD. 6",
        "B",
    ),
}
"""What each requests from the hub, a row as the set has it, and the problem and the answer read from it."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=CHAT_TEMPLATE))


def read(data: DataConfig, rows: list[Any], tokenizer: Tokenizer, folder: Path, **how: Any) -> list[tuple[str, str]]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(str(folder / "a.jsonl"), data, tokenizer, 900, **how)
    return [(prompt.text, prompt.answer) for prompt in prompts]


def test_every_mapping_is_tried() -> None:
    assert sorted(PUBLISHED) == sorted(path.stem for path in (conf_dir() / "dataset").glob("*.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "source"])
def test_public_sets_are_read_by_their_columns(
    name: str, form: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, row, problem, answer = PUBLISHED[name]
    asked: list[tuple[str, str | None, str]] = []

    def hub(source: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((source, subset, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    overrides = ["objective=grpo", "prompt=r1_distill", f"dataset={name}"]
    if form == "jsonl":
        (tmp_path / "local.jsonl").write_text(json.dumps(row) + "\n")
        overrides.append(f"data.train={tmp_path}/local.jsonl")
    elif form == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "local.parquet")
        overrides.append(f"data.train={tmp_path}/local.parquet")
    elif form == "source":
        overrides[-1] = f"data.sources=[{{dataset: {name}, weight: 2}}]"
    config = load_config(overrides)
    ((prompt,),) = read_domains(config, tokenizer)
    assert asked == ([wanted] if form == "source" else [])
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert prompt.text == f"<user>{problem}\n{boxed}\n<assistant>"
    assert reference_answer(prompt.answer) == answer
    kind = config.data.sources[0].reward or config.reward.kind if form == "source" else config.reward.kind
    assert kind == ("multiple_choice" if name == "mmlu" else "math_verify")


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["x", "y"], 0, "A"),
        (["x", "y"], "B", "B"),
        (["x", "y"], " y ", "B"),
        ([1, 2.5], "2.5", "B"),
        (list("vwxyz"), 4, "E"),
        (["x", "y"], 1.0, "B"),
        (["x", "y"], "b", "B"),
        (["x", "y"], "(B)", "B"),
        (["x", "y"], "B. y", "B"),
        (["", "y"], 1, "B"),
        (["B", "y"], 0, "A"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "B", "B"),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", "B"),
        ({"label": ["A", "B"], "text": ["x", "y"]}, "x", "A"),
    ],
)
def test_an_answer_names_its_choice(choices: Any, answer: Any, letter: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(template="plain", choices_key="options")
    ((text, found),) = read(data, [{"prompt": "q", "options": choices, "answer": answer}], tokenizer, tmp_path)
    assert (
        found == letter
        and text.startswith("q\nA. ")
        and len(text.split("\n")) == 1 + len(choices["text"] if isinstance(choices, dict) else choices)
    )


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (["x", "y"], 2, "'answer' is 2, none of the 2 choices"),
        (["x", "y"], -1, "'answer' is -1, none of"),
        (["x", "y"], "2", "'answer' is '2', none of"),
        (["x", "y"], True, "'answer' is True, none of"),
        (["x", "y"], 0.5, "'answer' is 0.5, none of"),
        (["x", "y"], "A, B", "'answer' is 'A, B', none of"),
        (["B", "A"], "B", "'answer' is 'B', which could mean each of the choices A, B: write the number"),
        (["x", "y", "x"], "x", "which could mean each of the choices A, C"),
        (["x"], 0, r"'options' is \['x'\], not a list of choices"),
        ("xy", 0, "'options' is 'xy', not a list of choices"),
        ({"text": ["x", "y"], "label": ["A"]}, "A", "not a list of choices"),
        (["x", None], 0, "not a list of choices"),
    ],
)
def test_an_answer_beyond_the_choices_is_refused(
    choices: Any, answer: Any, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = DataConfig(template="plain", choices_key="options")
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        read(data, [{"prompt": "q", "options": choices, "answer": answer}], tokenizer, tmp_path)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages_are_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = DataConfig(message_template="{prompt} Box it.")
    talk = [message("system", "S"), message("user", "1+1"), message("assistant", "2"), message("user", "2+2")]
    parts = [message("user", [{"type": "text", "text": "3"}, {"type": "text", "text": "+3"}])]
    rows = [{"prompt": talk, "answer": "4"}, {"prompt": parts, "answer": "6"}, {"prompt": "4+4", "answer": "8"}]
    assert [text for text, _ in read(chat, rows, tokenizer, tmp_path)] == [
        "<system>S\n<user>1+1\n<assistant>2\n<user>2+2 Box it.\n<assistant>",
        "<user>3+3 Box it.\n<assistant>",
        "<user>4+4 Box it.\n<assistant>",
    ]
    plain = DataConfig(template="plain", prompt_key="talk.0.content")
    assert read(plain, [{"talk": [message("user", "x")], "answer": "1"}], tokenizer, tmp_path) == [("x", "1")]
    assert read(replace(plain, prompt_key="talk"), [{"talk": [message("user", "x")], "answer": "1"}], tokenizer, tmp_path) == [
        ("x", "1")
    ]


@pytest.mark.parametrize(
    ("messages", "overrides", "message"),
    [
        ([], {}, "neither text nor messages"),
        (["x"], {}, "neither text nor messages"),
        ([{"from": "human", "value": "x"}], {}, "neither text nor messages"),
        ([message("user", "x"), message("assistant", "y")], {}, "ends with a message of the assistant"),
        ([message("system", "x"), message("user", "y")], {"system_prompt": "S"}, "already has a system message"),
        ([message("user", "")], {}, r"'prompt\.content' is empty"),
        ([message("user", [{"type": "image"}])], {}, r"'prompt\.content' is .*not text"),
        ([message("user", "x"), message("user", "y")], {"template": "plain"}, "2 messages, but data.template=plain"),
    ],
)
def test_messages_that_are_no_prompt_are_refused(
    messages: Any, overrides: dict[str, str], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        read(DataConfig(**overrides), [{"prompt": messages, "answer": "1"}], tokenizer, tmp_path)  # type: ignore[arg-type]


def test_a_pattern_finds_the_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(template="plain", prompt_pattern="^Q: (.*) A:$")
    assert read(data, [{"prompt": "Q: 1+\n1 A:", "answer": "2"}], tokenizer, tmp_path) == [("1+\n1", "2")]
    with pytest.raises(DataError, match=r"row 1: the prompt does not match data\.prompt_pattern: '1\+1'"):
        read(data, [{"prompt": "1+1", "answer": "2"}], tokenizer, tmp_path)
    for pattern in ("(", "x", "(x)(y)"):
        with pytest.raises(ConfigError, match=r"data\.prompt_pattern="):
            read(replace(data, prompt_pattern=pattern), [{"prompt": "x", "answer": "2"}], tokenizer, tmp_path)


def test_nested_keys(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "q", "a.b": "literal", "a": {"b": "nested", "c": {"d": ["x", "7"]}}}
    for key, value in (("a.b", "literal"), ("a.c.d.1", "7"), ("a.c.d", "x, 7")):
        assert read(DataConfig(template="plain", answer_key=key), [row], tokenizer, tmp_path) == [("q", value)]
    for key in ("a.x", "a.c.d.2", "a.b.c", "b"):
        with pytest.raises(DataError, match=rf"row 1 has no column '{key}' \(it has: prompt, a\.b, a\): set data\.answer_key"):
            read(DataConfig(template="plain", answer_key=key), [row], tokenizer, tmp_path)


def test_a_source_names_a_mapping_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: no such dataset 'gsm9k'; there are: .*did you mean 'gsm8k'"):
        load_config(["objective=grpo", "data.sources=[{dataset: gsm9k}]"])
    (source,) = load_config(["objective=grpo", "data.sources=[{dataset: gsm8k, path: x.jsonl, prompt_key: q}]"]).data.sources
    assert (source.path, source.prompt_key, source.answer_key, source.subset) == ("x.jsonl", "q", "answer", "main")
