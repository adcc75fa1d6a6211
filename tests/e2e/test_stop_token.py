"""A student and a teacher that end their responses with different tokens, as a base model and a chat model do: if the final
token were distilled, the student would learn never to stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank
from tests.support.zoo import Zoo

END, OTHER_END = 0, 5
Run = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def run(zoo: Zoo, ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train in a separate folder and return the metrics of each step."""
    folder = tmp_path_factory.mktemp("stop_token")
    rows = [{"prompt": f"{index}+1=", "answer": str(index + 1), "response": str(index + 1)} for index in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name: str, *overrides: str) -> list[dict[str, float]]:
        settings = [f"run.dir={folder / name}", f"data.train={folder}/data.jsonl", "data.template=plain", "reward=exact_match"]
        settings += ["reward.workers=1", "rollout.prompts_per_step=8", "rollout.max_response_tokens=24", "optimizer.lr=3e-3"]
        (outcome,) = ranks1.run(train_on_rank, [*settings, *FAST, *overrides])
        assert outcome.code == 0, outcome.stderr
        return metrics_of(folder / name)

    student = folder / "student"
    train("sft", f"student.path={zoo.model('untied')}", "objective=sft", "trainer.steps=40")
    shutil.move(folder / "sft" / "hf", student)
    shutil.copytree(student, folder / "teacher")
    weights = load_file(student / "model.safetensors")
    head = weights["lm_head.weight"]
    head[[END, OTHER_END]] = head[[OTHER_END, END]]
    save_file(weights, folder / "teacher" / "model.safetensors", metadata={"format": "pt"})
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": [OTHER_END]}))
    pair = (
        f"student.path={student}",
        f"teacher.path={folder}/teacher",
        "objective=kd_rkl",
        "trainer.steps=24",
        "optimizer.lr=1e-2",
    )
    return lambda name, *overrides: train(name, *pair, "rollout.responses_per_prompt=4", *overrides)


@pytest.mark.parametrize(
    ("student", "teacher", "decided"),
    [
        ("untied", "teacher", "the token that ends a response is distilled; both models end with 0 ('<|end|>')"),
        ("untied", "other_end", "is left out of distillation; the student ends with 0 ('<|end|>'), the teacher with 0"),
        ("no_tokenizer", "teacher_no_tokenizer", "has no tokenizer, so it is not known whether both models end"),
    ],
)
def test_one_line_says_what_is_done_with_it_and_why(
    student: str, teacher: str, decided: str, zoo: Zoo, ranks1: RankPool, tmp_path: Path
) -> None:
    path = zoo.model(teacher)
    if teacher == "other_end":
        path = shutil.copytree(zoo.model("teacher"), tmp_path / "other_end")
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, OTHER_END]}))
    settings = [f"run.dir={tmp_path}/run", f"student.path={zoo.model(student)}", f"teacher.path={path}", "trainer.steps=1"]
    settings += ["rollout=replay", f"rollout.path={zoo.rollouts('two')}", "objective=kd_rkl", "checkpoint.export_hf=false"]
    (outcome,) = ranks1.run(train_on_rank, [*settings, *FAST])
    assert outcome.code == 0, outcome.stderr
    (line,) = [line for line in outcome.log if line.startswith("objective.kd.stop_token=auto: ")]
    assert decided in line


def test_with_it_responses_never_end_and_without_it_they_do(run: Run) -> None:
    kept, left_out = run("kept", "objective.kd.stop_token=keep"), run("left_out")
    assert kept[0]["truncated"] < 0.1 and left_out[0]["truncated"] < 0.1  # the same student
    assert kept[-1]["truncated"] > 0.8
    assert left_out[-1]["truncated"] < 0.2
    assert kept[-1]["response_length"] > 3 * left_out[-1]["response_length"]
    assert left_out[0]["taught_share"] < 1.0
