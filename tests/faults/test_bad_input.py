"""Bad input: one clear line on stderr that says what, where and what to do, exit code 1 or 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks import RankPool
from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.training import QUIET, train_on_rank
from tests.zoo import Zoo


def base(zoo: Zoo, run: Path) -> dict[str, str]:
    """A run that works, by key."""
    return {
        "run.dir": str(run),
        "trainer.steps": "1",
        "student.path": str(zoo.model("untied")),
        "teacher.path": str(zoo.model("teacher")),
        "rollout": "replay",
        "rollout.path": str(zoo.rollouts("uneven")),
        "objective": "kdrl",
    }


Change = Callable[[Zoo, Path], dict[str, str]]
"""(zoo, an empty folder) -> the overrides that spoil the run."""


def copy_of(zoo: Zoo, name: str, folder: Path) -> Path:
    return Path(shutil.copytree(zoo.model(name), folder / name))


def without_a_tensor(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "untied", folder)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return {"student.path": str(model)}


def with_another_shape(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "teacher", folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    return {"teacher.path": str(model)}


def cut_short(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "untied", folder)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return {"student.path": str(model)}


def not_safetensors(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "teacher", folder)
    (model / "model.safetensors").write_bytes(b"\xff" * 5000)
    return {"teacher.path": str(model)}


def with_a_nan(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "untied", folder)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return {"student.path": str(model)}


def with_another_tokenizer(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "teacher", folder)
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"swap":').replace('"b":', '"a":').replace('"swap":', '"b":'))
    return {"teacher.path": str(model)}


def cut_rollouts(zoo: Zoo, folder: Path) -> dict[str, str]:
    text = zoo.rollouts("uneven").read_text()
    (folder / "cut.jsonl").write_text(text[:-20])
    return {"rollout.path": str(folder / "cut.jsonl")}


def foreign_tokens(zoo: Zoo, folder: Path) -> dict[str, str]:
    rows = read_jsonl(zoo.rollouts("uneven"))
    rows[3]["response_token_ids"][-1] = 61
    return {"rollout.path": str(write_jsonl(folder / "foreign.jsonl", rows))}


def negative_tokens(zoo: Zoo, folder: Path) -> dict[str, str]:
    rows = read_jsonl(zoo.rollouts("uneven"))
    rows[1]["prompt_token_ids"][0] = -1
    return {"rollout.path": str(write_jsonl(folder / "negative.jsonl", rows))}


def infinite_log_prob(zoo: Zoo, folder: Path) -> dict[str, str]:
    rows = read_jsonl(zoo.rollouts("uneven"))
    rows[2]["sampler_log_probs"][0] = float("-inf")
    return {"rollout.path": str(write_jsonl(folder / "infinite.jsonl", rows))}


def sampling(zoo: Zoo, folder: Path) -> dict[str, str]:
    """A run that samples, on one prompt."""
    (folder / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return {"rollout": "megatron", "data.train": str(folder / "train.jsonl"), "data.template": "plain"}


def no_answers(zoo: Zoo, folder: Path) -> dict[str, str]:
    (folder / "train.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n')
    return {**sampling(zoo, folder), "data.train": str(folder / "train.jsonl")} | {"data.answer_key": "result"}


def fixed(**overrides: str) -> Change:
    return lambda zoo, folder: {key.replace("__", "."): value for key, value in overrides.items()}


# name: (what spoils the run, exit code, words that the line must have)
SPOILED: dict[str, tuple[Change, int, list[str]]] = {
    "unknown key": (fixed(trainer__step="3"), 2, ["trainer.step", "trainer.steps"]),
    "unknown group choice": (fixed(objective="kdlr"), 2, ["objective=kdlr", "kdrl"]),
    "text for a number": (fixed(trainer__steps="many"), 2, ["trainer.steps", "many"]),
    "value that is not a choice": (fixed(objective__kd__estimator="k4"), 2, ["objective.kd.estimator=k4", "k1, k2, k3"]),
    "negative size": (fixed(rollout__temperature="-1"), 2, ["rollout.temperature"]),
    "no teacher for beta": (fixed(teacher__path="null"), 2, ["teacher.path", "objective=grpo"]),
    "missing student": (fixed(student__path="/no/such/model"), 1, ["/no/such/model"]),
    "missing teacher": (fixed(teacher__path="/no/such/model"), 1, ["/no/such/model"]),
    "missing rollout file": (fixed(rollout__path="/no/such/file.jsonl"), 1, ["/no/such/file.jsonl", "rollout file"]),
    "missing data": (lambda z, f: {**sampling(z, f), "data.train": "/no/such.jsonl"}, 1, ["/no/such.jsonl", "does not exist"]),
    "data without answers": (no_answers, 1, ["train.jsonl", "'result'", "data.answer_key"]),
    "different tokenizers": (with_another_tokenizer, 1, ["different tokenizers", "at id", "'a'", "'b'"]),
    "one response per prompt": (
        lambda z, f: {**sampling(z, f), "rollout.responses_per_prompt": "1"},
        2,
        ["rollout.responses_per_prompt=1", "at least 2", "objective.alpha.init=0"],
    ),
    "a group of one in the file": (
        lambda z, f: {"rollout.path": str(z.rollouts("one"))},
        1,
        ["group 0", "single response", "objective.alpha.init=0"],
    ),
    "truncated rollout file": (cut_rollouts, 1, ["cut.jsonl line 12", "cut off"]),
    "token ids beyond the vocabulary": (foreign_tokens, 1, ["foreign.jsonl line 4", "61", "tokenizer"]),
    "negative token ids": (negative_tokens, 1, ["negative.jsonl line 2", "prompt_token_ids"]),
    "infinite sampler log-prob": (infinite_log_prob, 1, ["infinite.jsonl line 3", "sampler_log_probs"]),
    "ranks that do not divide": (fixed(parallel__tensor="3"), 2, ["2 ranks", "tensor 3"]),
    "teacher layout that does not fit": (fixed(teacher__parallel__pipeline="4"), 2, ["2 ranks", "pipeline 4"]),
    "layers that do not divide": (
        fixed(parallel__pipeline="2", parallel__virtual_pipeline="4"),
        2,
        ["layers (4)", "divide by 8"],
    ),
    "sequence parallelism alone": (fixed(parallel__sequence_parallel="true"), 2, ["parallel.sequence_parallel", "tensor > 1"]),
    "missing tensor": (without_a_tensor, 1, ["untied", "model.layers.2.mlp.up_proj.weight"]),
    "another shape than the config": (with_another_shape, 1, ["teacher", "config.json", "shape"]),
    "safetensors cut short": (cut_short, 1, ["model.safetensors", "cut short"]),
    "not safetensors": (not_safetensors, 1, ["model.safetensors", "damaged"]),
    "a NaN in the student": (with_a_nan, 1, ["self-test", "not finite"]),
    "no checkpoint there": (fixed(checkpoint__resume="/no/such/step_000001"), 1, ["/no/such/step_000001", "checkpoint"]),
}


@pytest.mark.parametrize(("change", "code", "words"), SPOILED.values(), ids=list(SPOILED))
def test_one_clear_line(change: Change, code: int, words: list[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """On two ranks: both end with the code, one of them prints the line."""
    overrides = {**base(zoo, tmp_path / "run"), **change(zoo, tmp_path)}
    outcomes = ranks2.run(train_on_rank, [*QUIET, *(f"{key}={value}" for key, value in overrides.items())], timeout=90)
    assert [outcome.code for outcome in outcomes] == [code, code]
    lines = [line for outcome in outcomes for line in outcome.stderr.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert not (tmp_path / "run" / "hf").exists()


def launch(ranks: int, overrides: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "kdrl_mcore.train", *QUIET, *(f"{key}={value}" for key, value in overrides.items())]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )


def test_torchrun_ends_all_ranks_where_only_one_meets_the_error(zoo: Zoo, tmp_path: Path) -> None:
    """The second pipeline stage's file is damaged: the first stage, which waits for it, does not wait for ever."""
    model = copy_of(zoo, "untied", tmp_path)
    weights = load_file(model / "model.safetensors")
    second = {
        name
        for name in weights
        if ".layers.2." in name or ".layers.3." in name or name in ("model.norm.weight", "lm_head.weight")
    }
    files = {"model-1.safetensors": set(weights) - second, "model-2.safetensors": second}
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, model / file, metadata={"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (model / "model.safetensors").unlink()
    (model / "model-2.safetensors").write_bytes((model / "model-2.safetensors").read_bytes()[:-100])
    overrides = {**base(zoo, tmp_path / "run"), "student.path": str(model), "parallel.pipeline": "2"}
    result = launch(2, overrides)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "model-2.safetensors" in lines[0] and "cut short" in lines[0]
    # torchrun adds a traceback of its own; ours there is none.
    assert [line for line in result.stderr.splitlines() if 'File "' in line and "kdrl_mcore" in line] == []


def test_torchrun_prints_a_configuration_error_once(zoo: Zoo, tmp_path: Path) -> None:
    result = launch(2, {**base(zoo, tmp_path / "run"), "rollout.pathh": "x"})
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rollout.pathh" in lines[0] and "rollout.path'" in lines[0]
    assert result.returncode == 1  # torchrun's own; the ranks' is 2
    assert "exitcode  : 2" in result.stderr


def test_one_rank_alone_exits_with_the_code(tmp_path: Path, zoo: Zoo) -> None:
    command = [sys.executable, "-m", "kdrl_mcore.train", "student.path=/no/such/model", "objective=grpo", "data.train=x.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(result.stderr.splitlines()) == 1 and "/no/such/model" in result.stderr
