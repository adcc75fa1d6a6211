"""The benchmarks' configurations: each loads, requests from the hub what it names, and reads rows as published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdrl_mcore.config import REWARD_KINDS, BenchmarkConfig, conf_dir, load_benchmark, load_config
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.evaluation.benchmarks import load_benchmarks
from kdrl_mcore.evaluation.generations import Generations
from kdrl_mcore.reward.verifier import Verifier
from tests.support.tokenizers import CHAT_TEMPLATE, byte_level, save_tokenizer

NAMES = sorted(path.stem for path in (conf_dir() / "benchmark").glob("*.yaml"))
PUBLISHED: dict[str, tuple[tuple[str, str | None, str], dict[str, Any], str]] = {
    "aime24": (("HuggingFaceH4/aime_2024", None, "train"), {"problem": "Find x.", "answer": "204"}, "204"),
    "aime25": (("math-ai/aime25", None, "test"), {"problem": "Find x.", "answer": "70"}, "70"),
    "math_500": (("HuggingFaceH4/MATH-500", None, "test"), {"problem": "Find x.", "answer": r"\frac{14}{3}"}, r"\frac{14}{3}"),
    "amc23": (("math-ai/amc23", None, "test"), {"question": "Find x.", "answer": 27.0}, "27"),
    "minerva": (("math-ai/minervamath", None, "test"), {"question": "Find x.", "answer": "4.5e33"}, "4.5e33"),
    "olympiad_bench": (
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        {"question": "Find x.", "context": None, "final_answer": ["$2$", "3"]},
        "$2$, 3",
    ),
}
"""What each requests from the hub, a row as the published set has it, and the reference answer read from it."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_a_benchmark_with_a_reward_that_exists(name: str) -> None:
    benchmark = load_benchmark(name)
    assert isinstance(benchmark, BenchmarkConfig) and benchmark.reward in REWARD_KINDS
    Verifier(replace(load_config(["objective=grpo"]).reward, kind=benchmark.reward)).close()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_are_read_by_their_columns(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, row, answer = PUBLISHED[name]
    asked: list[tuple[str, str | None, str]] = []

    def hub(source: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((source, subset, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    config = load_config(["objective=grpo", "prompt=r1_distill", f"eval.benchmarks=[{name}]"])
    (benchmark,) = load_benchmarks(config, tokenizer)
    assert (asked, benchmark.name, benchmark.reward) == ([wanted], name, "math_verify")
    (prompt,) = benchmark.prompts
    assert prompt.answer == answer
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert prompt.text == f"<user>Find x.\n{boxed}\n<assistant>"


def test_the_runs_own_prompts_and_the_template_of_zero_rl(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+1?", "answer": i + 1}) + "\n" for i in range(3)))
    settings = ["objective=grpo", "prompt=zero_rl", f"data.eval={file}", "eval.max_prompts=2"]
    (benchmark,) = load_benchmarks(load_config(settings), tokenizer)
    assert (benchmark.name, benchmark.reward, len(benchmark.prompts)) == ("held_out", None, 2)
    assert benchmark.prompts[0].text.startswith("Question: 0+1?\n") and benchmark.prompts[0].text.endswith("\nAnswer:")


def test_a_benchmark_is_known_and_listed_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no such benchmark 'aime23'; there are: aime24, .*did you mean 'aime2"):
        load_benchmark("aime23")
    row = {"problem": "x", "answer": "1"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    with pytest.raises(ConfigError, match="two benchmarks are called 'aime24'"):
        load_benchmarks(load_config(["objective=grpo", "eval.benchmarks=[aime24,aime24]"]), tokenizer)


def test_experiments_use_the_template_of_their_model() -> None:
    r1, zero = (load_config([f"experiment={name}"]).data for name in ("paper_1p5b", "paper_zero_3b"))
    assert r1.template == "chat" and r1.message_template.endswith("within \\boxed{}.") and r1.system_prompt is None
    assert zero.template == "plain" and zero.plain_template.startswith("Question: {prompt}")


def test_an_evaluation_in_training_is_not_taken_up_again(tmp_path: Path) -> None:
    assert Generations(tmp_path / "anew").read("b", "sampled", 0, [], 1) is None
    assert not (tmp_path / "anew").exists()


def test_an_evaluation_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    settings = {"seed": 1, "rollout": {"engine": "megatron"}}
    for _ in range(2):
        Generations(tmp_path, settings)
    with pytest.raises(DataError, match=r'other settings, rollout\.engine was "megatron" and is now "vllm"'):
        Generations(tmp_path, settings | {"rollout": {"engine": "vllm"}})
    with pytest.raises(DataError, match="seed was 1 and is now null"):
        Generations(tmp_path, {"rollout": {"engine": "megatron"}})
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(DataError, match=r"settings\.json is damaged"):
        Generations(tmp_path, settings)
