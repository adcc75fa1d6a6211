"""Every preset of conf/objective trains for two steps on sampled responses, with the models and passes that it needs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kdrl_mcore.config import conf_dir, load_config
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank
from tests.support.zoo import Zoo

PRESETS = sorted(path.stem for path in (conf_dir() / "objective").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("presets") / "data.jsonl"
    rows = [{"prompt": f"{index}+1=", "answer": str(index % 3), "response": str(index + 1)} for index in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains(preset: str, data: Path, zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    """The length of a response modulo 3 decides whether it is correct, since a random student gets nothing else right."""
    settings = [f"objective={preset}", f"run.dir={tmp_path}", f"student.path={zoo.model('untied')}", f"data.train={data}"]
    settings += [f"teacher.path={zoo.model('teacher')}", "data.template=plain", "reward.workers=1"]
    settings += [
        "reward.kind=tests.support.rewards:LengthModulo",
        "rollout.prompts_per_step=4",
        "rollout.responses_per_prompt=4",
    ]
    settings += ["rollout.max_response_tokens=12", "batch.updates_per_step=2", "trainer.steps=2", "checkpoint.export_hf=false"]
    if load_config(settings).objective.kd.estimator == "top_k":
        settings.append("objective.kd.top_k=8")
    (outcome,) = ranks1.run(train_on_rank, [*settings, *FAST, "optimizer.lr=1e-3"])
    assert outcome.code == 0, outcome.stderr
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and row["skipped_updates"] == 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
