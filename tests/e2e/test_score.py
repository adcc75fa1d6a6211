"""`tools/score.py`: scores are the dense reference's in every layout, files are compared token by token, and bad input gives
one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.dense import Row, Settings
from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.support import ROOT
from tests.support.commands import assert_scores, score_on_rank
from tests.support.ranks import RankPool
from tests.support.zoo import TOKENS, Zoo

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LAYOUTS = {
    "one rank": (1, ""),
    "small blocks": (1, "--micro-tokens 10"),
    "tp2": (2, "--tensor-parallel 2"),
    "pp2": (2, "--pipeline-parallel 2"),
    "dp2, teacher tp2": (2, "--teacher-tensor-parallel 2"),
    "tp2, teacher pp2": (2, "--tensor-parallel 2 --teacher-tensor-parallel 1 --teacher-pipeline-parallel 2"),
    "tp2 pp2": (4, "--tensor-parallel 2 --pipeline-parallel 2 --micro-tokens 40"),
}


def run_alone(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The tool as a user starts it, on one rank."""
    command = [sys.executable, "tools/score.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def expected(zoo: Zoo) -> dict[str, list[torch.Tensor]]:
    settings = Settings(beta=0.1, temperature=0.7, vocab_size=TOKENS)
    result = zoo.reference("untied", "teacher", "uneven", settings)
    return {"log_probs": result.log_probs, "entropy": result.entropies, "teacher_log_probs": result.teacher_log_probs}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_scores_are_those_of_the_dense_reference(
    layout: tuple[int, str], zoo: Zoo, pools: dict[int, RankPool], expected: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    ranks, options = layout
    models = ["--model", str(zoo.model("untied")), "--teacher", str(zoo.model("teacher")), "--temperature", "0.7"]
    files = ["--input", str(zoo.rollouts("uneven")), "--output", str(tmp_path / "scored.jsonl")]
    outcomes = pools[ranks].run(score_on_rank, [*models, *files, *options.split()])
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    assert [outcome.stdout for outcome in outcomes[1:]] == [""] * (ranks - 1)
    assert_scores(tmp_path / "scored.jsonl", expected)
    given = [{key: row[key] for key in zoo.rows("uneven")[0]} for row in read_jsonl(tmp_path / "scored.jsonl")]
    assert given == [{**row, "sampler_log_probs": np.float32(row["sampler_log_probs"]).tolist()} for row in zoo.rows("uneven")]


def test_torchrun_scores_and_ends(zoo: Zoo, expected: dict[str, list[torch.Tensor]], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/score.py"]
    options = ["--model", zoo.model("untied"), "--temperature", "0.7", "--pipeline-parallel", "2"]
    files = ["--input", zoo.rollouts("uneven"), "--output", tmp_path / "scored.jsonl"]
    done = subprocess.run(
        [*map(str, [*torchrun, *options, *files])], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scored 12 responses") == 1
    assert_scores(tmp_path / "scored.jsonl", {name: expected[name] for name in ("log_probs", "entropy")})


def scored(zoo: Zoo, path: Path, change: Callable[[list[Row]], None] = lambda rows: None) -> Path:
    """A made-up scored file, whose log-probs are the sampler's."""
    rows = deepcopy(zoo.rows("uneven"))
    for row in rows:
        row |= {"log_probs": list(row["sampler_log_probs"]), "entropy": list(row["sampler_log_probs"])}
    change(rows)
    return write_jsonl(path, rows)


def spoil(rows: list[Row]) -> None:
    rows[3]["log_probs"][2] += 0.5
    rows[5]["log_probs"][1] -= 0.25


def test_compare_reports_largest_mean_and_the_worst_tokens(zoo: Zoo, tmp_path: Path) -> None:
    from kdrl_mcore.rollout.comparison import compare_scores
    from kdrl_mcore.rollout.files import read_scored

    left, right = scored(zoo, tmp_path / "left.jsonl", spoil), scored(zoo, tmp_path / "right.jsonl")
    entropy, log_probs = compare_scores(read_scored(left), read_scored(right))
    tokens = sum(len(row["response_token_ids"]) for row in zoo.rows("uneven"))
    assert (entropy.name, entropy.num_tokens, entropy.largest, entropy.mean) == ("entropy", tokens, 0.0, 0.0)
    assert (log_probs.name, log_probs.num_tokens) == ("log_probs", tokens)
    assert log_probs.largest == pytest.approx(0.5, abs=1e-6)
    assert log_probs.mean == pytest.approx(0.75 / tokens, abs=1e-6)
    first, second = log_probs.worst[:2]
    rows = zoo.rows("uneven")
    assert (first.line, first.index, first.token_id) == (4, 2, rows[3]["response_token_ids"][2])
    assert (second.line, second.index, second.prompt_id) == (6, 1, rows[5]["prompt_id"])
    assert first.left - first.right == pytest.approx(0.5, abs=1e-6)


def test_a_number_against_none_is_infinitely_far(zoo: Zoo, tmp_path: Path) -> None:
    from kdrl_mcore.rollout.comparison import compare_scores
    from kdrl_mcore.rollout.files import read_scored

    def lose(rows: list[Row]) -> None:
        rows[1]["log_probs"][0] = float("nan")
        rows[2]["entropy"][0] = float("-inf")

    broken, whole = scored(zoo, tmp_path / "broken.jsonl", lose), scored(zoo, tmp_path / "whole.jsonl")
    assert [each.largest for each in compare_scores(read_scored(broken), read_scored(whole))] == [float("inf")] * 2
    assert [each.largest for each in compare_scores(read_scored(broken), read_scored(broken))] == [0.0, 0.0]


@dataclass(frozen=True)
class Comparison:
    """A call with `--compare`: how the two files are made, further options, the exit code, and words of the output."""

    left: Callable[[Zoo, Path], Path]
    right: Callable[[Zoo, Path], Path]
    code: int
    words: tuple[str, ...]
    options: tuple[str, ...] = ()


def plain(zoo: Zoo, path: Path) -> Path:
    return zoo.rollouts("uneven")


def spoiled(zoo: Zoo, path: Path) -> Path:
    return scored(zoo, path, spoil)


def noisy(zoo: Zoo, path: Path) -> Path:
    """A rollout file whose sampler was slightly different."""
    rows = deepcopy(zoo.rows("uneven"))
    rows[4]["sampler_log_probs"][0] -= 0.25
    return write_jsonl(path, rows)


def with_teacher(zoo: Zoo, path: Path) -> Path:
    """A scored file that has a teacher's scores."""

    def add(rows: list[Row]) -> None:
        spoil(rows)
        for row in rows:
            row["teacher_log_probs"] = [-1.0] * len(row["response_token_ids"])

    return scored(zoo, path, add)


def _distilled(zoo: Zoo, path: Path, places: range) -> Path:
    rows = deepcopy(zoo.rows("uneven"))
    for row in rows[places.start : places.stop : places.step]:
        row["teacher_log_probs"] = [-1.125] * len(row["response_token_ids"])
    return write_jsonl(path, rows)


def distilled(zoo: Zoo, path: Path) -> Path:
    """A run's rollouts, of which the mask kept every second one for the teacher."""
    return _distilled(zoo, path, range(0, 12, 2))


def distilled_elsewhere(zoo: Zoo, path: Path) -> Path:
    return _distilled(zoo, path, range(1, 12, 2))


def all_distilled(zoo: Zoo, path: Path) -> Path:
    return _distilled(zoo, path, range(12))


def longer(zoo: Zoo, path: Path) -> Path:
    return scored(zoo, path, lambda rows: rows.append(rows[0]))


def of_another_response(zoo: Zoo, path: Path) -> Path:
    return scored(zoo, path, lambda rows: rows[4]["response_token_ids"].__setitem__(0, 59))


def cut_off(zoo: Zoo, path: Path) -> Path:
    whole = scored(zoo, path).read_text()
    path.write_text(whole[:-30])
    return path


COMPARISONS = {
    "trainer against sampler": Comparison(spoiled, plain, 0, ("log_probs - sampler_log_probs", "0.5")),
    "below the tolerance": Comparison(spoiled, scored, 0, ("log_probs",), ("--tolerance", "0.6")),
    "above the tolerance": Comparison(spoiled, scored, 1, ("exceeds --tolerance 0.4",), ("--tolerance", "0.4")),
    "another number of responses": Comparison(longer, scored, 1, ("13 and 12 responses",)),
    "other responses": Comparison(of_another_response, scored, 1, ("line 5 has different response_token_ids",)),
    "two rollout files": Comparison(plain, noisy, 0, ("sampler_log_probs", "0.25")),
    "sampler against trainer": Comparison(plain, spoiled, 0, ("sampler_log_probs - log_probs", "0.5")),
    "a run's rollouts, some distilled": Comparison(
        with_teacher, distilled, 0, ("log_probs - sampler_log_probs", "teacher_log_probs", "0.5", "0.125")
    ),
    "a run's rollouts, all distilled": Comparison(
        with_teacher, all_distilled, 0, ("log_probs - sampler_log_probs", "teacher_log_probs", "0.5", "0.125")
    ),
    "a run's rollouts on the left": Comparison(
        distilled, with_teacher, 0, ("sampler_log_probs - log_probs", "teacher_log_probs")
    ),
    "two runs' rollouts, distilled apart": Comparison(distilled, distilled_elsewhere, 0, ("sampler_log_probs",)),
    "a cut file": Comparison(scored, cut_off, 1, ("line 12 is cut off",)),
    "a missing file": Comparison(scored, lambda zoo, path: path, 1, ("right.jsonl does not exist",)),
    "a tolerance of nothing": Comparison(scored, scored, 2, ("--tolerance=-1", "at least 0"), ("--tolerance", "-1")),
}


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=list(COMPARISONS))
def test_compare(comparison: Comparison, zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    left, right = comparison.left(zoo, tmp_path / "left.jsonl"), comparison.right(zoo, tmp_path / "right.jsonl")
    (outcome,) = ranks1.run(score_on_rank, ["--input", str(left), "--compare", str(right), *comparison.options])
    assert outcome.code == comparison.code, outcome.stderr
    if comparison.code == 0:
        assert outcome.stderr == ""
    else:
        errors = outcome.stderr.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ")
    for word in comparison.words:
        assert word in outcome.stdout + outcome.stderr


def test_a_runs_rollouts_are_compared_where_the_teacher_was_asked(zoo: Zoo, tmp_path: Path) -> None:
    from kdrl_mcore.rollout.comparison import compare_scores
    from kdrl_mcore.rollout.files import read_scored

    left, right = with_teacher(zoo, tmp_path / "left.jsonl"), distilled(zoo, tmp_path / "right.jsonl")
    teacher, policy = compare_scores(read_scored(left), read_scored(right))
    lengths = [len(row["response_token_ids"]) for row in zoo.rows("uneven")]
    assert (teacher.name, teacher.num_responses, teacher.num_tokens) == ("teacher_log_probs", 6, sum(lengths[::2]))
    assert (teacher.largest, teacher.mean) == (0.125, 0.125)
    assert {token.line % 2 for token in teacher.worst} == {1} and teacher.worst[0].index == 0
    assert (policy.name, policy.num_responses, policy.num_tokens) == ("log_probs - sampler_log_probs", 12, sum(lengths))
    assert policy.largest == pytest.approx(0.5, abs=1e-6) and policy.worst[0].line == 4


def with_foreign_token(zoo: Zoo, folder: Path) -> Path:
    rows = deepcopy(zoo.rows("uneven"))
    rows[6]["response_token_ids"][0] = 64
    return write_jsonl(folder / "foreign.jsonl", rows)


BAD = {
    "a model that is none": ("--model {folder} --input {good} --output {folder}/out.jsonl", 1, "config.json"),
    "a missing input": (
        "--model {model} --input {folder}/none.jsonl --output {folder}/out.jsonl",
        1,
        "none.jsonl does not exist",
    ),
    "no output": ("--model {model} --input {good}", 2, "--output"),
    "tokens of another tokenizer": ("--model {model} --input {foreign} --output {folder}/out.jsonl", 1, "line 7: token id 64"),
    "too many tensor ranks": ("--model {model} --input {good} --output {folder}/out.jsonl --tensor-parallel 3", 2, "3"),
    "a size of nothing": (
        "--model {model} --input {good} --output {folder}/out.jsonl --micro-tokens 0",
        2,
        "--micro-tokens=0 must be at least 1",
    ),
    "an output in a file": ("--model {model} --input {good} --output {good}/out.jsonl", 1, "cannot be written"),
    "an output over its input": ("--model {model} --input {good} --output {roundabout}", 2, "would be lost"),
    "nothing to do": ("--input {good}", 2, "nothing to do"),
    "a tolerance without a comparison": (
        "--model {model} --input {good} --output {folder}/out.jsonl --tolerance 1",
        2,
        "--tolerance needs --compare",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "words"), BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line(arguments: str, code: int, words: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    places = {
        "model": zoo.model("untied"),
        "good": zoo.rollouts("uneven"),
        "foreign": with_foreign_token(zoo, tmp_path),
        "folder": tmp_path,
        "roundabout": zoo.folder / ".." / zoo.folder.name / zoo.rollouts("uneven").name,
    }
    outcomes = ranks2.run(score_on_rank, [word.format(**places) for word in arguments.split()])
    (line,) = "".join(outcome.stderr for outcome in outcomes).splitlines()
    assert max(outcome.code for outcome in outcomes) == code and line.startswith("error: ") and words in line
    assert not (tmp_path / "out.jsonl").exists()


def test_help_and_errors_without_a_world() -> None:
    answer = run_alone("--help")
    assert answer.returncode == 0 and "--compare OTHER" in answer.stdout
    answer = run_alone("--input", "/nowhere/none.jsonl", "--compare", "/nowhere/other.jsonl")
    assert answer.returncode == 1
    assert answer.stderr.splitlines() == [answer.stderr.strip()] and "other.jsonl does not exist" in answer.stderr
