"""The tiny task: the data are always the same, no problem is in two sets, answers are right, and all readers agree on the
tokenizer."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2ForCausalLM

from examples import jobs
from examples.tiny import make_pair
from examples.tiny.task import (
    END_OF_TEXT,
    FLAWED_DIGIT,
    SPLITS,
    TEACHER_SET,
    Problem,
    all_problems,
    make_splits,
    make_tokenizer,
    worked_answer,
    write_data,
)
from kdrl_mcore.config import load_config
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import MetricsLog

FLAW_RATE = 0.8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_data(directory, FLAW_RATE)
    return directory


def rows(data: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def boxed(response: str) -> str:
    (answer,) = re.findall(r"\\boxed\{(\d+)\}", response)
    return answer


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(data: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "same", FLAW_RATE)
    write_data(tmp_path / "other", FLAW_RATE, seed=1)
    names = [*SPLITS, TEACHER_SET]
    assert sorted(path.stem for path in data.iterdir()) == sorted(names)
    for name in names:
        written = (data / f"{name}.jsonl").read_bytes()
        assert written == (tmp_path / "same" / f"{name}.jsonl").read_bytes()
        assert written != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_no_problem_is_in_two_sets_or_twice_in_one(data: Path) -> None:
    prompts = [row["prompt"] for name in SPLITS for row in rows(data, name)]
    assert len(prompts) == len(set(prompts)) == sum(SPLITS.values())
    assert len(rows(data, "eval")) >= 300


def test_the_teacher_learns_from_the_same_problems_as_the_student(data: Path) -> None:
    assert [row["prompt"] for row in rows(data, "sft")] == [row["prompt"] for row in rows(data, TEACHER_SET)]


@pytest.mark.parametrize("name", [*SPLITS, TEACHER_SET])
def test_answers_are_the_sums(data: Path, name: str) -> None:
    for row in rows(data, name):
        assert int(row["answer"]) == sum(int(digit) for digit in row["prompt"].rstrip("=").split("+"))


def test_every_line_of_a_worked_answer_is_right(data: Path) -> None:
    for row in rows(data, "sft"):
        *additions, last = row["response"].split("\n")
        digits = row["prompt"].rstrip("=").split("+")
        total = digits[0]
        for digit, addition in zip(digits[1:], additions, strict=True):
            left, result = addition.split("=")
            assert left == f"{total}+{digit}" and int(result) == int(total) + int(digit)
            total = result
        assert last == f"\\boxed{{{row['answer']}}}"


def test_the_teachers_mistakes_are_of_one_kind_and_in_the_wanted_share(data: Path) -> None:
    taught = rows(data, TEACHER_SET)
    wrong = [row for row in taught if boxed(row["response"]) != row["answer"]]
    assert 0.80 < 1 - len(wrong) / len(taught) < 0.92
    for row in taught:
        for addition in row["response"].split("\n")[:-1]:
            left, digit, result = map(int, re.fullmatch(r"(\d+)\+(\d)=(\d+)", addition).groups())  # type: ignore[union-attr]
            may_be_flawed = digit == FLAWED_DIGIT and left >= 10 and left % 10 + digit >= 10
            assert result == left + digit or (may_be_flawed and result == left + digit - 1)


def test_a_flaw_carries_on_from_the_wrong_sum() -> None:
    response = worked_answer(Problem((9, 9, 7, 2)), flaw_rate=1.0, rng=random.Random(0))
    assert response == "9+9=18\n18+7=24\n24+2=26\n\\boxed{26}"


def test_there_are_as_many_problems_as_the_sets_need() -> None:
    assert len(list(all_problems())) == 9**2 + 9**3 + 9**4 + 9**5 > sum(SPLITS.values())
    assert {name: len(problems) for name, problems in make_splits().items()} == SPLITS


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_every_reader_of_the_checkpoint_gets_the_same_tokens(tmp_path: Path, name: str) -> None:
    make_pair.write_random_model(tmp_path, name)
    probe = "3+8=11\n11+5=16\n\\boxed{16}\n\n  a b\t\r\n$\\frac{1}{2}$ é 中"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(probe, add_special_tokens=False)
    assert ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(probe, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == probe
    assert len(ids) == len(probe.encode())  # one token per byte
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_response_fits_the_length_limit() -> None:
    tokenizer = make_tokenizer()
    longest = max(len(tokenizer.encode(worked_answer(problem) + END_OF_TEXT)) for problem in list(all_problems())[-2000:])
    assert longest == 42 <= load_config(["experiment=tiny_cpu"]).rollout.max_response_tokens


def test_the_experiments_name_what_the_example_writes() -> None:
    sft, kdrl = load_config(["experiment=tiny_sft"]), load_config(["experiment=tiny_cpu"])
    assert sft.objective.kind == "sft" and kdrl.objective.kind == "kdrl"
    assert kdrl.student.path == str(make_pair.DEFAULT_DIR / "student")
    assert kdrl.teacher.path == str(make_pair.DEFAULT_DIR / "teacher")
    assert kdrl.data.eval == str(make_pair.DEFAULT_DIR / "data" / "eval.jsonl")
    assert sft.data.template == kdrl.data.template == "plain"


def test_presets_keep_their_coefficients_in_the_tiny_experiment() -> None:
    assert load_config(["experiment=tiny_cpu", "objective=grpo"]).objective.beta.init == 0.0
    assert load_config(["experiment=tiny_cpu", "objective=kd_rkl"]).objective.alpha.init == 0.0


def test_the_student_is_the_checkpoint_nearest_to_the_wanted_accuracy(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step, accuracy in ((25, 0.1), (50, 0.48), (75, 0.9)):
            log.write(step, {"loss": 1.0})
            log.write(step, {"eval/accuracy": accuracy})
    assert make_pair.nearest_step(tmp_path, make_pair.STUDENT_ACCURACY) == (50, 0.48)
    assert make_pair.nearest_step(tmp_path, None) == (75, 0.9)


def job(name: str, run_dir: Path, code: str) -> jobs.Job:
    """A stand-in for a training run: a Python process that runs `code`."""
    log = run_dir.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=subprocess.STDOUT)
    return jobs.Job(name, run_dir, log, process)


def test_following_shows_the_newest_step_of_each_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, step in (("kdrl", 7), ("grpo", 9)):
        with MetricsLog(tmp_path / name) as log:
            log.write(step, {"reward": 0.5})
    jobs.follow([job(name, tmp_path / name, "") for name in ("kdrl", "grpo")])
    assert capsys.readouterr().out.splitlines() == [
        "  kdrl       step 7    reward 0.500",
        "  grpo       step 9    reward 0.500",
    ]


def test_a_job_that_fails_stops_the_others_and_shows_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = job("slow", tmp_path / "slow", "import time; time.sleep(600)")
    broken = job("broken", tmp_path / "broken", "print('no such file'); raise SystemExit(3)")
    with pytest.raises(KdrlError, match=r"'broken' ended with exit code 3.*broken\.log"):
        jobs.follow([slow, broken])
    assert slow.process.poll() not in (None, 0)  # it did not end by itself
    assert "no such file" in capsys.readouterr().err
