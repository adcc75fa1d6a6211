"""With a teacher whose tokenizer has other added tokens, a response is distilled up to the first of these."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference.tiny_models import write_jsonl
from tests.support.agreement import JOINT, Case, check, overrides_of
from tests.support.ranks import RankPool
from tests.support.training import train_on_rank
from tests.support.zoo import Zoo

OTHER = (0, 7)  # the one that ends a response, and one that is frequent in random responses
SOME = replace(JOINT, unshared=OTHER)
CASES = {
    "k2, tp2": Case(2, "parallel.tensor=2", SOME),
    "k1, magnitude, cp2": Case(
        2, "parallel.context=2", replace(SOME, estimator="k1", token_weight="magnitude", share=0.5, mask="response")
    ),
}


@pytest.fixture(scope="module")
def other(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo in which teacher and student have different added tokens at `OTHER`, and the teacher reads separate prompts: the
    student's, without any such token."""
    folder = tmp_path_factory.mktemp("other")
    for name in ("untied", "teacher"):
        shutil.copytree(zoo.model(name), folder / name)
        file = folder / name / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = {index: token for token, index in tokenizer["model"]["vocab"].items()}
        for index in OTHER:
            if (index, name) == (0, "untied"):
                continue
            vocabulary[index] = f"<{name}{index}>"
            found = [each for each in tokenizer["added_tokens"] if each["id"] == index]
            entry = {**tokenizer["added_tokens"][0], "id": index, "content": vocabulary[index]}
            tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if each not in found] + [entry]
        tokenizer["model"]["vocab"] = {token: index for index, token in vocabulary.items()}
        file.write_text(json.dumps(tokenizer))
        if name == "teacher":
            settings = json.loads((folder / name / "tokenizer_config.json").read_text())
            (folder / name / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<teacher0>"}))
    rows = zoo.rows("uneven")
    for row in rows:
        row["teacher_prompts"] = {"teacher": [token if token not in OTHER else 9 for token in row["prompt_token_ids"]]}
    write_jsonl(folder / "uneven.jsonl", rows)
    return Zoo(folder)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradients_agree_with_the_dense_reference(case: Case, other: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    assert any(7 in row["response_token_ids"] for row in other.rows("uneven"))
    case = replace(case, overrides=f"{case.overrides} teacher.prompt.template=plain")
    check(case, other, pools[case.ranks], tmp_path)


def test_what_needs_the_whole_vocabulary_or_the_students_prompt_is_refused(
    other: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    overrides = overrides_of(other, tmp_path, "untied")
    (outcome,) = pools[1].run(train_on_rank, [*overrides, "objective.kd.estimator=exact"])
    assert outcome.code == 2 and "other added tokens" in outcome.stderr and "set it to k1, k2 or k3" in outcome.stderr
    rows = other.rows("uneven")
    write_jsonl(tmp_path / "r.jsonl", [{**rows[0], "prompt_token_ids": [7, 8]}])
    (outcome,) = pools[1].run(train_on_rank, [*overrides, f"rollout.path={tmp_path}/r.jsonl"])
    assert outcome.code == 1 and "line 1: the prompt has token 7" in outcome.stderr, outcome.stderr
