"""What may change when a run resumes: the table is complete, documented and applied as written."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from kdrl_mcore.checkpointing.lineage import Lineage, from_json, new_lineage
from kdrl_mcore.config import Config, flatten
from kdrl_mcore.config.keys import general_name
from kdrl_mcore.config.resuming import RULES, changes, markdown, refused, restarted, rule_of
from kdrl_mcore.config.schema import NamedTeacherConfig, ScheduleConfig
from kdrl_mcore.objective.schedules import Coefficient
from tests.support import ROOT

DOCS = ROOT / "docs" / "operations.md"
DEFAULTS = flatten(asdict(Config(teachers={"maths": NamedTeacherConfig()})))


def test_every_key_has_a_rule_and_every_rule_has_a_key() -> None:
    decided = {key: rule_of(key) for key in DEFAULTS}
    for name, rule in RULES.items():
        assert any(decided[key] is rule and f"{general_name(key)}.".startswith(f"{name}.") for key in DEFAULTS), name
    with pytest.raises(KeyError):
        rule_of("unknown.key")


def test_what_makes_another_experiment() -> None:
    """Model, data, task, objective and seed, but nothing that steers the run and nothing about the machine."""
    assert {key for key in DEFAULTS if rule_of(key).effect in ("fixed", "content")} == {
        *(
            "student.path",
            "teacher.path",
            "teachers.maths.path",
            "model.dtype",
            "optimizer.name",
            "objective.kind",
            "reward.kind",
            "trainer.seed",
        ),
        "teacher.weights",
        *(f"student.lora.{name}" for name in ("rank", "alpha", "target_modules", "path")),
        *(key for key in DEFAULTS if key.startswith("data.") and key != "data.eval"),
        *("rollout.path", "rollout.given.path"),
        *(key for key in DEFAULTS if key.startswith("student.lora.")),
    }
    for prefix in ("parallel.", "objective.beta.", "optimizer.adam", "checkpoint.every", "logging.", "cluster.", "eval."):
        assert {rule_of(key).effect for key in DEFAULTS if key.startswith(prefix)} == {"wins"}, prefix


def test_operations_shows_the_table() -> None:
    assert markdown() in DOCS.read_text(), "put kdrl_mcore.config.resuming.markdown() into docs/operations.md"


@pytest.mark.parametrize("key", [key for key in DEFAULTS if rule_of(key).effect != "start"])
def test_every_key_that_differs_is_told(key: str) -> None:
    new = [{"path": "new"}] if key == "data.sources" else "new"
    (change,) = changes(DEFAULTS, DEFAULTS | {key: new})
    assert change.key == key and str(change).startswith(f"{key}: ") and str(change).endswith(f" -> {new}")


@pytest.mark.parametrize("key", [key for key in DEFAULTS if rule_of(key).effect == "start"])
def test_what_is_of_one_start_is_not_compared(key: str) -> None:
    assert changes(DEFAULTS, DEFAULTS | {key: "new"}) == []


def test_a_key_that_an_earlier_version_did_not_have_had_its_default() -> None:
    old = {key: value for key, value in DEFAULTS.items() if not key.startswith("eval.")} | {"eval.gone": 3}
    assert changes(old, DEFAULTS) == []
    (change,) = changes(old, DEFAULTS | {"eval.samples": 5})
    assert str(change) == "eval.samples: 1 -> 5"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"teacher.path": "a"}, {"teacher.path": "b"}, None),  # beta is 0, so the teacher is not used
        ({"teacher.path": "a", "objective.beta.init": 1.0}, {}, None),  # kdrl -> grpo
        ({}, {"teacher.path": "a", "objective.beta.init": 1.0}, None),  # grpo -> kdrl
        (
            {"teacher.path": "a", "objective.beta.init": 1.0},
            {"teacher.path": "b", "objective.beta.kind": "switch", "objective.beta.after": 1.0},
            "teacher.path: a -> b",
        ),
        ({"rollout.path": "a"}, {"rollout.path": "b"}, None),  # nothing is replayed
        ({"rollout.engine": "replay", "rollout.path": "a"}, {"rollout.engine": "replay", "rollout.path": "b"}, "rollout.path"),
        ({"rollout.engine": "replay"}, {"rollout.engine": "megatron"}, "rollout.engine: replay -> megatron"),
        ({"rollout.engine": "vllm"}, {"rollout.engine": "megatron"}, None),
        ({"data.train": "a"}, {"data.train": "b"}, "data.train: a -> b"),
        ({"data.eval": "a"}, {"data.eval": "b"}, None),
        ({"data.shuffle": True}, {"data.shuffle": False}, "data.shuffle: true -> false"),
        ({"student.path": "a"}, {"student.path": "b"}, "student.path: a -> b"),
    ],
)
def test_another_experiment_is_told_by_its_difference(old: dict[str, Any], new: dict[str, Any], told: str | None) -> None:
    found = refused(DEFAULTS | old, DEFAULTS | new, lambda key, before, now: before == now)
    assert (found == []) if told is None else (len(found) == 1 and found[0].startswith(told)), found


def test_the_same_path_with_another_content_is_another_experiment() -> None:
    same = DEFAULTS | {"data.train": "a"}
    (line,) = refused(same, same, lambda key, before, now: key != "data.train")
    assert line.startswith("data.train=a, whose content has changed")


def test_an_adaptive_schedule_restarts_when_its_own_keys_change_and_else_goes_on() -> None:
    settings = {"kind": "adaptive", "init": 0.5, "target": 0.1, "max": 10.0}
    ran = Coefficient(ScheduleConfig(**settings))
    ran.advance(0.5)
    assert ran.value > 0.5
    for changed, restarts in (({}, False), ({"eta": 0.2}, True), ({"init": 0.3}, True)):
        now = Coefficient(ScheduleConfig(**(settings | changed)))
        keys = {f"objective.beta.{key}": value for key, value in (settings | changed).items()}
        found = restarted(DEFAULTS | {f"objective.beta.{key}": v for key, v in settings.items()}, DEFAULTS | keys)
        assert found == ({"beta"} if restarts else set())
        now.load_state_dict(ran.state_dict(), restart="beta" in found)
        assert now.value == (changed.get("init", 0.5) if restarts else ran.value)


@pytest.mark.parametrize(
    ("key", "anew"),
    [
        ("data.eval", {"accuracy", "best"}),
        ("eval.benchmarks", {"accuracy", "best"}),
        ("eval.max_prompts", {"accuracy", "best"}),
        ("checkpoint.best", {"best"}),
        ("eval.every", set()),
        ("checkpoint.every", set()),
    ],
)
def test_records_of_evaluations_begin_anew_when_what_is_measured_differs(key: str, anew: set[str]) -> None:
    assert restarted(DEFAULTS, DEFAULTS | {key: "other"}) == anew


def test_a_plateau_forgets_the_accuracies_of_other_problems_and_not_that_it_has_switched() -> None:
    ran = Coefficient(ScheduleConfig(kind="plateau", init=1.0, after=0.5, patience=2))
    for accuracy in (0.9, 0.8):
        ran.observe(accuracy)
    now, same = Coefficient(ran._schedule), Coefficient(ran._schedule)
    now.load_state_dict(ran.state_dict(), measures_anew=True)
    same.load_state_dict(ran.state_dict())
    for each in (now, same):
        each.observe(0.3)
    assert (now.value, same.value) == (1.0, 0.5)
    now.load_state_dict(same.state_dict(), measures_anew=True)
    assert now.value == 0.5


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "switch"])
def test_a_coefficient_that_does_not_adapt_is_the_present_settings_alone(kind: str) -> None:
    old = Coefficient(ScheduleConfig(kind=kind, init=0.5, delta=0.1, steps=4, after=0.2))
    settings = ScheduleConfig(kind=kind, init=0.9, delta=0.05, steps=8, after=0.3)
    now, whole = Coefficient(settings), Coefficient(settings)
    for each in (old, old, whole, whole):
        each.advance(None)
    now.load_state_dict(old.state_dict())
    assert now.value == whole.value


def test_a_lineage_has_its_own_past_and_no_other() -> None:
    first = new_lineage()
    second = first.branched_off(4)
    third = first.branched_off(2)
    fourth = second.branched_off(6)
    assert second.has(first.branch, 4) and not second.has(first.branch, 5) and second.has(second.branch, 50)
    assert not third.has(second.branch, 5) and not third.has(first.branch, 3)
    assert fourth.has(second.branch, 6) and not fourth.has(second.branch, 7) and fourth.has(first.branch, 4)
    assert second.shared(first, 8) == 4 and first.shared(second, 3) == 3 and third.shared(fourth, 9) == 2
    assert new_lineage().shared(first, 8) is None
    assert fourth.branched_off(3).segments[:-1] == ((first.branch, 3),)
    assert from_json(fourth.as_json()) == fourth and from_json(None) == Lineage()
