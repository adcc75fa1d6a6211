"""The code of the tutorials does what they say, and the public names can be imported.

(tests/convert/test_docs.py runs the code of the tutorial on families.)
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdrl_mcore.config import CombineConfig, RewardConfig, load_config
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.objective.combine import RULES, Signals
from kdrl_mcore.objective.functions import find_function
from kdrl_mcore.reward.registry import build_reward, needed_columns
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.types import Rollout

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"


def blocks(page: str, language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (TUTORIALS / f"{page}.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder whose modules Python finds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


def run(code: str, path: Path, *arguments: str) -> None:
    path.write_text(code)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def response(text: str) -> Rollout:
    tokens = np.zeros(1, dtype=np.int64)
    return Rollout("0", 0, tokens, tokens, np.zeros(1, dtype=np.float32), "stop", 0, response=text, answer="1")


def test_the_reward_scores_what_the_page_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("own_reward", "python")
    (folder / "my_rewards.py").write_text(code[0])
    run(code[1], folder / "try_reward.py")
    (shown,) = re.findall(r"\$ python try_reward.py\n(.*?)```", (TUTORIALS / "own_reward.md").read_text(), flags=re.DOTALL)
    assert capsys.readouterr().out == shown


def test_the_other_rewards_of_the_page_work(folder: Path) -> None:
    code = blocks("own_reward", "python")
    (folder / "more_rewards.py").write_text("\n".join(code[2:]))
    config = RewardConfig()
    words = build_reward("more_rewards:KnownWords", config)
    assert words.score([response("The sum is 3"), response("")]) == [0.75, 0.0]
    words.close()
    assert needed_columns("more_rewards:long_enough") == ["num_steps"]
    rollout = response("1+1=2\n2")
    rollout.columns = {"num_steps": 1}
    assert build_reward("more_rewards:long_enough", config).score([rollout]) == [1.0]


def test_the_data_and_the_keys_of_your_own_pair(folder: Path) -> None:
    (make_data,) = blocks("own_pair", "python")
    run(make_data, folder / "make_data.py")
    texts = ((folder / f"{name}.jsonl").read_text() for name in ("train", "held_out"))
    train, held_out = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert (len(train), len(held_out)) == (600, 100)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert json.dumps(train[0]) in (TUTORIALS / "own_pair.md").read_text()
    (keys,) = blocks("own_pair", "yaml")
    (folder / "mine.yaml").write_text(keys)
    config = load_config(["--config", "mine.yaml", "parallel.tensor=2", "teacher.parallel.tensor=2"])
    assert (config.run.dir, config.objective.beta.init, config.data.eval) == ("runs/mine", 0.05, "held_out.jsonl")


def test_mixed_groups_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts = [response("1"), response("2"), response("1"), response("1")]
    for index, rollout in enumerate(rollouts):
        rollout.group_id, rollout.correct = index // 2, rollout.response == "1"
    write_rollouts(folder / "run" / "rollouts" / "step_000001.jsonl", rollouts)
    with MetricsLog(folder / "run") as log:
        log.write(1, {"accuracy": 0.75})
    (code,) = blocks("reading_a_run", "python")
    run(code, folder / "groups.py", "run")
    assert capsys.readouterr().out == "step 1: accuracy 0.75, 1 of 2 groups are mixed\n"


def test_the_rule_on_the_page_about_the_method_can_be_named(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (TUTORIALS.parent / "method.md").read_text(), flags=re.DOTALL)
    (folder / "my_rules.py").write_text(code)
    rule = find_function("objective.combine.kind", "my_rules:below_the_mean", RULES)
    advantages, correct = torch.tensor([1.0, -1.0]), torch.tensor([True, False])
    coefficients, weights = rule(Signals(advantages, correct, torch.ones(2), correct), CombineConfig(), 1.0)
    assert coefficients.tolist() == [1.0, -1.0] and weights.tolist() == [0.0, 1.0]


PUBLIC = re.findall(r"^\| `(kdrl_mcore\.[\w.]+)` \| (.*?) \|", (TUTORIALS.parent / "api.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(("path", "names"), PUBLIC, ids=[path for path, _ in PUBLIC])
def test_what_is_public_can_be_imported(path: str, names: str) -> None:
    module = importlib.import_module(path)
    assert [name for name in re.findall(r"`(\w+)`", names) if name != "exit_code" and not hasattr(module, name)] == []


def test_the_tutorials_import_only_what_is_public() -> None:
    code = "".join(block for page in TUTORIALS.glob("*.md") for block in blocks(page.stem, "python"))
    assert set(re.findall(r"from (kdrl_mcore[\w.]*) import", code)) <= {path for path, _ in PUBLIC}
