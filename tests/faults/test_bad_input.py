"""Bad input ends a run with one clear line on stderr that says what, where and what to do, exit code 1 or 2, and no
traceback."""

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

from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.support.ranks import RankPool
from tests.support.training import QUIET, train_on_rank
from tests.support.zoo import Zoo


def base(zoo: Zoo, run: Path) -> dict[str, str]:
    """The configuration, by key, of a run that works."""
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
"""(zoo, an empty folder) -> the overrides that break the run."""


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


def beyond_the_positions(zoo: Zoo, folder: Path) -> dict[str, str]:
    """A prompt of 6 tokens in row 2, and room for 507 more of the 512 positions."""
    rows = [{"prompt": prompt, "answer": "2"} for prompt in ("1+1=", "1+1+0=", "1+1=")]
    return {**sampling(zoo, folder), "data.train": str(write_jsonl(folder / "train.jsonl", rows))} | {
        "rollout.max_response_tokens": "507"
    }


def evaluated_beyond_the_positions(zoo: Zoo, folder: Path) -> dict[str, str]:
    long = write_jsonl(folder / "held_out.jsonl", [{"prompt": "1+" * 300 + "1=", "answer": "301"}])
    return {**sampling(zoo, folder), "data.eval": str(long)}


def a_short_teacher(zoo: Zoo, folder: Path) -> dict[str, str]:
    model = copy_of(zoo, "teacher", folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    return {"teacher.path": str(model)}


def long_rollouts(zoo: Zoo, folder: Path) -> dict[str, str]:
    rows = read_jsonl(zoo.rollouts("uneven"))
    rows[5] |= {"response_token_ids": [7] * 600, "sampler_log_probs": [-1.0] * 600}
    return {"rollout.path": str(write_jsonl(folder / "long.jsonl", rows))}


def long_targets(zoo: Zoo, folder: Path) -> dict[str, str]:
    rows = [{"prompt": "1+1=", "response": "2"}, {"prompt": "1+1=", "response": "2" * 520}]
    return {**sampling(zoo, folder), "objective": "sft"} | {"data.train": str(write_jsonl(folder / "sft.jsonl", rows))}


def added_token(zoo: Zoo, folder: Path, *, ends: bool = False, to: str = "untied") -> Path:
    """A model whose tokenizer has an added token without a row for it: there are 67 rows, and the token has id 70."""
    model = copy_of(zoo, to, folder)
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    new = {**tokenizer["added_tokens"][0], "content": "<new>"}
    filler = [{**new, "id": number, "content": f"<{number}>"} for number in range(61, 70)]
    tokenizer["added_tokens"] += [*filler, {**new, "id": 70}]
    file.write_text(json.dumps(tokenizer))
    if ends:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<new>"}))
        (model / "generation_config.json").unlink(missing_ok=True)
    return model


def a_token_without_a_row(zoo: Zoo, folder: Path, tensor: int = 1) -> dict[str, str]:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1<new>1=", "answer": "2"}]
    paths = {"student.path": str(added_token(zoo, folder)), "data.train": str(write_jsonl(folder / "rows.jsonl", rows))}
    return {**sampling(zoo, folder), **paths, "objective": "grpo", "parallel.tensor": str(tensor)}


def an_evaluated_token_without_a_row(zoo: Zoo, folder: Path) -> dict[str, str]:
    held_out = write_jsonl(folder / "held_out.jsonl", [{"prompt": "<new>", "answer": "2"}])
    paths = {"student.path": str(added_token(zoo, folder)), "data.eval": str(held_out)}
    return {**sampling(zoo, folder), **paths, "objective": "grpo"}


def a_target_without_a_row(zoo: Zoo, folder: Path) -> dict[str, str]:
    rows = [{"prompt": "1+1=", "response": "2<new>"}]
    paths = {"student.path": str(added_token(zoo, folder)), "data.train": str(write_jsonl(folder / "rows.jsonl", rows))}
    return {**sampling(zoo, folder), **paths, "objective": "sft", "parallel.tensor": "2"}


def an_end_without_a_row(zoo: Zoo, folder: Path) -> dict[str, str]:
    return {**sampling(zoo, folder), "student.path": str(added_token(zoo, folder, ends=True)), "objective": "grpo"}


def a_run_for_a_checkpoint(zoo: Zoo, folder: Path) -> dict[str, str]:
    for step in (2, 3):
        (folder / "before" / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    return {"checkpoint.resume": str(folder / "before")}


def fixed(**overrides: str) -> Change:
    return lambda zoo, folder: {key.replace("__", "."): value for key, value in overrides.items()}


# name: (what breaks the run, exit code, words that the line must contain)
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
    "a prompt and its response beyond the positions": (
        beyond_the_positions,
        1,
        ["train.jsonl row 2", "6 tokens", "rollout.max_response_tokens=507", "512 positions", "untied", "at most 506"],
    ),
    "an evaluated prompt beyond the positions": (
        evaluated_beyond_the_positions,
        1,
        ["held_out row 1", "602 tokens", "512 positions", "remove longer prompts"],
    ),
    "rollouts beyond the teacher's positions": (a_short_teacher, 1, ["uneven.jsonl line", "16 positions of", "teacher"]),
    "rollouts beyond the positions": (long_rollouts, 1, ["long.jsonl line 6", "512 positions"]),
    "a target beyond the positions": (long_targets, 1, ["sft.jsonl row 2", "521 tokens", "512 positions"]),
    "a token without a row": (a_token_without_a_row, 1, ["rows.jsonl row 2", "id 70", "61", "resize"]),
    "a token without a row, in shards": (
        lambda z, f: a_token_without_a_row(z, f, tensor=2),
        1,
        ["rows.jsonl row 2", "id 70", "61", "resize"],
    ),
    "an evaluated token without a row": (an_evaluated_token_without_a_row, 1, ["held_out row 1", "id 70", "67"]),
    "a target without a row": (a_target_without_a_row, 1, ["rows.jsonl row 1", "id 70", "61"]),
    "an end without a row": (an_end_without_a_row, 1, ["has 67 rows", "token 70 ('<new>')", "resize"]),
    "negative token ids": (negative_tokens, 1, ["negative.jsonl line 2", "prompt_token_ids"]),
    "infinite sampler log-prob": (infinite_log_prob, 1, ["infinite.jsonl line 3", "sampler_log_probs"]),
    "ranks that do not divide": (fixed(parallel__tensor="3"), 2, ["2 ranks", "tensor 3"]),
    "teacher layout that does not fit": (fixed(teacher__parallel__pipeline="4"), 2, ["2 ranks", "pipeline 4"]),
    "layers that do not divide": (
        fixed(parallel__pipeline="2", parallel__virtual_pipeline="4"),
        2,
        ["layers (4)", "divided by 8"],
    ),
    "sequence parallelism alone": (fixed(parallel__sequence_parallel="true"), 2, ["parallel.sequence_parallel", "tensor > 1"]),
    "missing tensor": (without_a_tensor, 1, ["untied", "model.layers.2.mlp.up_proj.weight"]),
    "another shape than the config": (with_another_shape, 1, ["teacher", "config.json", "shape"]),
    "safetensors cut short": (cut_short, 1, ["model.safetensors", "cut short"]),
    "not safetensors": (not_safetensors, 1, ["model.safetensors", "damaged"]),
    "a NaN in the student": (with_a_nan, 1, ["self-test", "not finite"]),
    "no checkpoint there": (fixed(checkpoint__resume="/no/such/step_000001"), 1, ["/no/such/step_000001", "does not exist"]),
    "a run for a checkpoint": (a_run_for_a_checkpoint, 1, ["holds checkpoints", "such as", "/before/checkpoints/step_000003"]),
    "checkpoints for one": (
        lambda z, f: {"checkpoint.resume": f"{a_run_for_a_checkpoint(z, f)['checkpoint.resume']}/checkpoints"},
        1,
        ["/before/checkpoints holds checkpoints", "/before/checkpoints/step_000003"],
    ),
}


@pytest.mark.parametrize(("change", "code", "words"), SPOILED.values(), ids=list(SPOILED))
def test_one_clear_line(change: Change, code: int, words: list[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """On two ranks, both end with the code and one of them prints the line."""
    overrides = {**base(zoo, tmp_path / "run"), **change(zoo, tmp_path)}
    outcomes = ranks2.run(train_on_rank, [*QUIET, *(f"{key}={value}" for key, value in overrides.items())], timeout=90)
    assert [outcome.code for outcome in outcomes] == [code, code]
    lines = [line for outcome in outcomes for line in outcome.stderr.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert not (tmp_path / "run" / "hf").exists()


def launch(*program: str | Path) -> subprocess.CompletedProcess[str]:
    """The same under torchrun, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, program)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )


def launch_training(overrides: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return launch("-m", "kdrl_mcore.train", *QUIET, *(f"{key}={value}" for key, value in overrides.items()))


def only_error_line(output: str) -> str:
    """The error is the last line of the output."""
    lines = [line for line in output.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], output
    return lines[-1]


def with_a_damaged_second_stage(zoo: Zoo, folder: Path) -> Path:
    model = copy_of(zoo, "untied", folder)
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
    return model


@pytest.mark.parametrize("program", ["train", "score"])
def test_torchrun_ends_all_ranks_where_only_one_meets_the_error(program: str, zoo: Zoo, tmp_path: Path) -> None:
    """The second pipeline stage's file is damaged: the first stage, which waits for that stage, does not hang."""
    model = with_a_damaged_second_stage(zoo, tmp_path)
    if program == "train":
        result = launch_training({**base(zoo, tmp_path / "run"), "student.path": str(model), "parallel.pipeline": "2"})
    else:
        files = ("--input", zoo.rollouts("one"), "--output", tmp_path / "scored.jsonl")
        result = launch("tools/score.py", "--model", model, "--pipeline-parallel", "2", *files)
    assert result.returncode == 1
    line = only_error_line(result.stderr)
    assert "model-2.safetensors" in line and "cut short" in line
    # torchrun prints its own traceback before the line; the program prints none.
    assert [line for line in result.stderr.splitlines() if 'File "' in line and "kdrl_mcore" in line] == []


def test_torchrun_ends_a_preflight_with_what_it_found(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    overrides = {**base(zoo, tmp_path / "run"), "run.dir": f"{tmp_path}/file", "teacher.path": "/no/such/model"}
    result = launch("-m", "kdrl_mcore.preflight", *(f"{key}={value}" for key, value in overrides.items()))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: preflight, ")]
    assert len(errors) > 1 and errors == result.stderr.splitlines()[-len(errors) :], result.stderr
    assert "/no/such/model" in errors[0] and f"{tmp_path}/file" in " ".join(errors)


def test_torchrun_prints_a_configuration_error_once(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 starts later than rank 1, which reports the error and ends by itself."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0': time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    result = launch_training({**base(zoo, tmp_path / "run"), "rollout.pathh": "x"})
    line = only_error_line(result.stderr)
    assert "rollout.pathh" in line and "rollout.path'" in line
    assert result.returncode == 1  # torchrun's exit code; the ranks' is 2
    assert "exitcode  : 2" in result.stderr


def test_one_rank_alone_exits_with_the_code(tmp_path: Path, zoo: Zoo) -> None:
    command = [sys.executable, "-m", "kdrl_mcore.train", "student.path=/no/such/model", "objective=grpo", "data.train=x.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(result.stderr.splitlines()) == 1 and "/no/such/model" in result.stderr
