"""Every numeric key has a range, and `load_config` refuses values outside it in one line that names the key."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from kdrl_mcore.cli import plan, score
from kdrl_mcore.config import BenchmarkConfig, Config, axes, load_config
from kdrl_mcore.config.keys import RANGES, key_types
from kdrl_mcore.config.ranges import Range, check_number, numbers
from kdrl_mcore.errors import ConfigError

TYPES = key_types()
NUMERIC = [name for name, types in TYPES.items() if {int, float} & set(types)]
IN_PARTS = ["rollout.steps_ahead=1", "objective.sampler_correction.kind=truncate"]
SERVED = ["objective.beta.init=1", "teacher.path=t", "teacher.server.kind=completions"]
NAMED_SERVED = ["teachers.NAME.path=t", "teachers.NAME.server.kind=completions"]
FITTING = {
    **{name: SERVED for name in NUMERIC if name.startswith("teacher.server.")},
    **{name: NAMED_SERVED for name in NUMERIC if name.startswith("teachers.NAME.server.")},
    "cluster.teacher_nodes": SERVED,
    "student.lora.alpha": ["student.lora.rank=8"],
    "parallel.virtual_pipeline": ["parallel.pipeline=2"],
    "parallel.bucket_size": ["parallel.overlap_grad_reduce=true"],
    "trainer.hang_timeout": [f"trainer.distributed_timeout_minutes={366 * 1440}"],
    "trainer.distributed_timeout_minutes": ["trainer.hang_timeout=0"],
    "rollout.responses_per_prompt": ["objective.alpha.init=0"],
    "rollout.steps_ahead": ["rollout=vllm", "rollout.vllm.placement=server"],
    "rollout.max_age": ["rollout=vllm", "rollout.vllm.placement=server", "rollout.steps_ahead=1"],
    "rollout.partial_tokens": [*IN_PARTS, "rollout.max_response_tokens=1000000000"],
    "rollout.max_continuations": [*IN_PARTS, "rollout.partial_tokens=1"],
    "objective.beta.init": ["teacher.path=t"],
    "teacher.decay": ["objective.beta.init=1", "teacher.weights=average"],
    "teacher.refresh_every": ["objective.beta.init=1", "teacher.weights=refreshed"],
    "teacher.min_ess": ["objective.beta.init=1", "teacher.weights=recorded", "rollout=replay", "rollout.path=r"],
    "teacher.prompt.max_tokens": ["objective.beta.init=1", "teacher.path=t", "teacher.prompt.template=chat"],
    "teachers.NAME.prompt.max_tokens": ["teachers.NAME.path=t", "teachers.NAME.prompt.template=chat"],
    "batch.updates_per_step": ["rollout.prompts_per_step=1000000000"],
    "reward.threshold": ["reward.kind=mine:score"],
    "rollout.given.share": ["objective.beta.init=1", "teacher.path=t", "objective.kd.estimator=exact"],
    "trainer.stop_after": ["data.eval=e.jsonl", "eval.every=1"],
}
"""Further settings with which only a key's range could refuse its bounds."""


@pytest.fixture(autouse=True)
def without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of these settings have no effect alone."""
    monkeypatch.setattr(axes, "check_effects", lambda objective: None)


def load(name: str, value: float, *others: str) -> Config:
    text = repr(value)
    if name.endswith("[]"):
        word = f"{name.removesuffix('[]')}=[{text}]"
    elif "[]." in name:
        listed, key = name.split("[].")
        word = f"{listed}=[{{{'path: a.jsonl, ' if listed == 'data.sources' else ''}{key}: {text}}}]"
    else:
        word = f"{name}={text}"
    return load_config(["objective=grpo", *others, word])


def test_every_numeric_key_has_a_range_and_no_other_key_has() -> None:
    assert set(NUMERIC) == set(RANGES)
    assert not [name for name, types in key_types(BenchmarkConfig).items() if {int, float} & set(types)]  # or give it ranges


def test_the_defaults_lie_in_their_ranges() -> None:
    for name, value in numbers(asdict(Config())):
        assert value in RANGES[name.replace("[0]", "[]")], name


@pytest.mark.parametrize("name", NUMERIC)
def test_both_ends_of_every_range(name: str) -> None:
    bounds, whole = RANGES[name], float not in TYPES[name]
    others = FITTING.get(name, ["teachers.NAME.path=t"] if name.startswith("teachers.") else [])
    for end, is_open, outwards in ((bounds.low, bounds.low_is_open, -1), (bounds.high, bounds.high_is_open, 1)):
        assert math.isfinite(end)
        step = 1 if whole else max(abs(end), 1e-30) * 2**-20
        inside: float = end - outwards * step if is_open else end
        outside: float = end if is_open else end + outwards * step
        if whole:
            inside, outside = int(inside), int(outside)
        assert inside in bounds and outside not in bounds
        if outwards > 0:
            load(name, inside, *others)
        with pytest.raises(ConfigError) as refused:
            load(name, outside, *others)
        assert str(refused.value).startswith(name.split("[]")[0]) and " must be " in str(refused.value)
        assert str(bounds) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NUMERIC)
def test_no_number_is_nan(name: str) -> None:
    assert math.inf not in RANGES[name] and -math.inf not in RANGES[name]
    with pytest.raises(ConfigError, match=name.split("[]")[0].replace(".", r"\.")):
        load(name, math.nan)


@pytest.mark.parametrize("word", ["1e400", "-1e400", ".nan", ".inf", "NaN", "-.inf", "true", "[]", "''", "null", "${nowhere}"])
def test_what_is_no_number_is_refused_too(word: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        load_config(["objective=grpo", f"optimizer.lr={word}"])


def test_a_range_reads_as_a_rule() -> None:
    assert str(Range(0, 1, low_is_open=True)) == "greater than 0 and at most 1"
    assert str(Range(1e-3, 1e3, also=(0,))) == "0 or at least 0.001 and at most 1000"
    with pytest.raises(ConfigError, match="--rate=nan must be at least 0"):
        check_number("--rate", math.nan, Range(0))


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--temperature", "nan"], "--temperature=nan"),
        (["--temperature", "inf"], "--temperature=inf"),
        (["--micro-tokens", "0"], "--micro-tokens=0"),
        (["--tensor-parallel", "-2"], "--tensor-parallel=-2"),
        (["--teacher-pipeline-parallel", "0"], "--teacher-pipeline-parallel=0"),
        (["--compare", __file__, "--tolerance", "nan"], "--tolerance=nan"),
    ],
)
def test_the_options_of_scoring(arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(["--model", "m", "--input", "i", "--output", "o", *arguments]) == 2
    assert f"error: {option} must be " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--correct", "nan"], ["--prompt-tokens", "-1"], ["--response-tokens", "0"]])
def test_the_options_of_planning(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["objective=grpo", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
