"""The self-test at the start of a run passes in every kind of layout, and refuses a sampler or a sum that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from kdrl_mcore.config import load_config
from tests.support.ranks import RankPool
from tests.support.training import QUIET, Outcome, train_on_rank
from tests.support.zoo import Zoo

PROMPTS = ["1+2=", "what is x", "9*9=", "a longer prompt than the others"]
LAYOUTS = {
    "one rank": (1, ""),
    # The micro-batches are smaller than the prompts that are sampled together: sampling makes Megatron-Core's gathering
    # buffer, and training uses it unchanged.
    "tp2 sp": (2, "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=44"),
    "pp2 interleaved": (2, "parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "cp2": (2, "parallel.context=2"),
    "dp2": (2, ""),
    "tp2 cp2 sp": (4, "parallel.tensor=2 parallel.context=2 parallel.sequence_parallel=true"),
    "tp2 pp2": (4, "parallel.tensor=2 parallel.pipeline=2"),
}


def run_spoiled_on_rank(overrides: list[str], fault: str, size: float) -> Outcome:
    """Train with one fault: the sampler reports one log-prob that is off by `size` or samples at another temperature, or ranks
    do not add up their shares of a sum or look for the targets in the wrong columns."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    faults = {"sampler": lambda: _shifted_token(size), "temperature": lambda: _other_temperature(size)}
    with {**faults, "sum": _missing_sum, "columns": _wrong_columns}[fault]():
        return train_on_rank(overrides)


@contextmanager
def _shifted_token(size: float) -> Iterator[None]:
    from kdrl_mcore.rollout.megatron import MegatronEngine

    generate = MegatronEngine.generate

    def shifted(engine: Any, *args: Any) -> Any:
        rollouts = generate(engine, *args)
        rollouts[2].sampler_log_probs[0] += np.float32(size)
        return rollouts

    with patch.object(MegatronEngine, "generate", shifted):
        yield


@contextmanager
def _other_temperature(temperature: float) -> Iterator[None]:
    from kdrl_mcore.rollout.megatron import MegatronEngine

    generate = MegatronEngine.generate

    def heated(engine: Any, prompts: Any, sampling: Any, *args: Any) -> Any:
        return generate(engine, prompts, replace(sampling, temperature=temperature), *args)

    with patch.object(MegatronEngine, "generate", heated):
        yield


@contextmanager
def _wrong_columns() -> Iterator[None]:
    from kdrl_mcore.vocab_parallel import VocabShard

    locate = VocabShard.locate
    with patch.object(VocabShard, "locate", lambda shard, ids: locate(shard, ids - 1)):
        yield


@contextmanager
def _missing_sum() -> Iterator[None]:
    from kdrl_mcore.vocab_parallel import chunk

    with patch.object(chunk, "sum_over_ranks", lambda value, shard: value):
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in PROMPTS))
    return path


def sampling(zoo: Zoo, prompts: Path, run: Path, *overrides: str) -> list[str]:
    """A run that tests itself and then makes one step."""
    return [
        f"run.dir={run}",
        f"student.path={zoo.model('untied')}",
        f"data.train={prompts}",
        "data.template=plain",
        "objective=grpo",
        "reward=exact_match",
        "reward.workers=1",
        "rollout.max_response_tokens=12",
        "trainer.steps=1",
        "checkpoint.export_hf=false",
        *QUIET,
        *overrides,
    ]


def replaying(zoo: Zoo, run: Path, *overrides: str) -> list[str]:
    replay = ("rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", "objective=grpo")
    return [f"run.dir={run}", f"student.path={zoo.model('untied')}", *replay, "trainer.steps=1", *QUIET, *overrides]


def passed(outcome: Outcome) -> bool:
    return any(message.startswith("self-test passed in ") for message in outcome.log)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_it_passes_in_seconds(
    layout: tuple[int, str], zoo: Zoo, prompts: Path, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    ranks, overrides = layout
    outcomes = pools[ranks].run(train_on_rank, sampling(zoo, prompts, tmp_path, *overrides.split()))
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    assert passed(outcomes[0])


def test_it_passes_on_replayed_rollouts_that_another_sampler_made(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    outcomes = ranks2.run(train_on_rank, replaying(zoo, tmp_path, "parallel.tensor=2", "checkpoint.export_hf=false"))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert passed(outcomes[0])


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
@pytest.mark.parametrize("size", [0.25, float("nan")])
def test_a_sampler_with_another_log_prob_is_refused_and_the_token_named(
    layout: str, size: float, zoo: Zoo, prompts: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    outcomes = ranks2.run(run_spoiled_on_rank, sampling(zoo, prompts, tmp_path, layout), "sampler", size)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    (line,) = [line for outcome in outcomes for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "on 1 of " in line and "response token 0 (id " in line and "prompt " in line
    assert "rollout.max_log_prob_drift" in line


def test_the_bound_is_a_setting_and_the_test_can_be_left_out(zoo: Zoo, prompts: Path, ranks1: RankPool, tmp_path: Path) -> None:
    for setting, code in (
        ("rollout.max_log_prob_drift=0.2", 1),
        ("rollout.max_log_prob_drift=0.3", 0),
        ("rollout.max_log_prob_drift=0.3 trainer.self_test=false", 0),
    ):
        overrides = sampling(zoo, prompts, tmp_path, *setting.split())
        (outcome,) = ranks1.run(run_spoiled_on_rank, overrides, "sampler", 0.25)
        assert outcome.code == code, (setting, outcome.stderr)
        assert passed(outcome) == (setting == "rollout.max_log_prob_drift=0.3")


@pytest.mark.parametrize("fault", ["sum", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_that_add_up_wrong_sums_are_refused(dtype: str, fault: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    overrides = replaying(zoo, tmp_path, "parallel.tensor=2", f"model.dtype={dtype}")
    outcomes = ranks2.run(run_spoiled_on_rank, overrides, fault, 0.0)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    errors = outcomes[0].stderr + outcomes[1].stderr
    assert "vocabulary-parallel sums are wrong in this layout" in errors


@pytest.mark.parametrize(
    ("fault", "size", "code"),
    [("sampler", 0.5, 0), ("sampler", float("nan"), 1), ("sampler", 5.0, 1), ("temperature", 1.2, 1)],
)
def test_bfloat16_is_judged_by_the_mean(
    fault: str, size: float, code: int, zoo: Zoo, prompts: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """Rounding may change one token by half a nat; another sampling temperature is an error, although no single token stands
    out."""
    overrides = sampling(zoo, prompts, tmp_path, "model.dtype=bfloat16", "parallel.tensor=2")
    outcomes = ranks2.run(run_spoiled_on_rank, overrides, fault, size)
    assert [outcome.code for outcome in outcomes] == [code] * 2, outcomes[0].stderr
    assert not code or "on average, more than 0.05" in outcomes[0].stderr + outcomes[1].stderr


def test_logits_of_hundreds_in_bfloat16_pass(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """Each log-prob is rounded by up to a nat."""
    shutil.copytree(zoo.model("untied"), tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    weights = load_file(path)
    weights["lm_head.weight"] *= 100.0
    save_file(weights, path, metadata={"format": "pt"})
    overrides = replaying(zoo, tmp_path / "run", "parallel.tensor=2", "model.dtype=bfloat16", "rollout.temperature=0.7")
    overrides += [f"student.path={tmp_path / 'model'}", "checkpoint.export_hf=false"]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert passed(outcomes[0])


def test_drift_while_training_is_an_alert_where_the_student_samples_for_itself() -> None:
    from kdrl_mcore.monitoring.alerts import DEFAULT_THRESHOLDS, sampler_drift
    from kdrl_mcore.monitoring.drift import alert_thresholds

    embedded = alert_thresholds(load_config(["objective=grpo"]))
    steps = [{"drift_mean": 1e-4, "drift_max": 0.01}] * 10  # float32 rounds to 1e-3
    assert sampler_drift(steps, embedded) is not None
    rounding = [{"drift_mean": 0.01, "drift_max": 2.0}] * 10  # in bfloat16 one token proves nothing
    assert sampler_drift(rounding, alert_thresholds(load_config(["objective=grpo", "model.dtype=bfloat16"]))) is None
    assert sampler_drift(steps, alert_thresholds(load_config(["objective=grpo", "rollout.max_log_prob_drift=0.1"]))) is None
    off_policy = alert_thresholds(load_config(["objective=grpo", "batch.updates_per_step=2"]))
    assert off_policy == replace(DEFAULT_THRESHOLDS, distilled=False)
    assert sampler_drift(rounding, alert_thresholds(load_config(["objective=grpo", "rollout.top_p=0.9"]))) is None
