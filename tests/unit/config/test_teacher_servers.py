"""Teachers on servers: what they cannot score and settings without effect are refused in one line; what follows elsewhere."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from functools import cache

import pytest
from omegaconf import OmegaConf

from kdrl_mcore.config import Config, check_config, flatten, load_config
from kdrl_mcore.config.derived import (
    known_models,
    knows_top_k,
    loaded_teachers,
    ranks_per_node,
    served_teachers,
    teacher_heads,
    teaches_itself,
    used_models,
)
from kdrl_mcore.config.overrides import apply, read_overrides
from kdrl_mcore.config.resuming import refused
from kdrl_mcore.errors import ConfigError

SERVER = "teacher.server"
LOG_PROBS, STATES = f"{SERVER}.kind=completions", f"{SERVER}.kind=hidden_states"
TOP_K = "objective.kd.estimator=top_k objective.kd.top_k_support=teacher"
SEVERAL = "teachers.a.values=[m] teachers.b.values=[l] teachers.a.path=A teachers.b.path=B teachers.a.server.kind=completions"


@cache
def base() -> Config:
    return load_config(
        ["objective=kdrl", "student.path=s", "data.sources=[{path: m.jsonl, name: m}, {path: l.jsonl, name: l}]", LOG_PROBS]
    )


def load(settings: str) -> Config:
    """The configuration with these overrides, composed only once."""
    composed = OmegaConf.structured(deepcopy(base()))
    composed.teacher.server.kind = "none" if "teachers." in settings else "completions"
    for each in read_overrides(settings.split(), ()):
        apply(composed, each.name, each.value, each.word)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    check_config(config)
    return config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("objective.kd.estimator=exact", "objective.kd.estimator=exact needs its whole distribution"),
        ("objective.kd.estimator=top_k_unbiased", "objective.kd.estimator=top_k_unbiased needs its whole distribution"),
        ("objective.kd.estimator=top_k", "top_k_support=student needs its log-probs of the student's top k"),
        ("objective.kd.control_variate=true", "objective.kd.control_variate=true needs its whole distribution"),
        ("objective.kd.token_weight.kind=teacher_entropy", "needs the entropy of its whole distribution"),
        (f"{TOP_K} objective.kd.divergence=forward objective.kd.mix=entropy", "objective.kd.mix=entropy needs the entropy"),
        ("rollout.temperature=0.7", "gives log-probs at temperature 1 only, and rollout.temperature=0.7"),
        ("teacher.prompt.template=chat", "name its folder with teacher.path"),
        (f"{STATES} objective.kd.estimator=exact", "needs the teacher's output head: name its folder with teacher.path"),
        (f"{STATES} {SERVER}.model=m", f"{SERVER}.model=m is for {SERVER}.kind=completions"),
        (f"{SERVER}.kind=none teacher.path=t {SERVER}.timeout=3", f"{SERVER}.timeout=3.0 is for a teacher on servers"),
        (f"{SERVER}.urls=[node7:8000]", "'node7:8000' is not an address such as http://node7:8000"),
        (f"{SERVER}.urls=['http://a','http://a']", "names http://a twice"),
        (f"{SERVER}.urls=['http://a'] {SERVER}.replicas=2", f"{SERVER}.replicas=2 is for servers without"),
        (f"{SERVER}.token_file=t", f"{SERVER}.token_file is for {SERVER}.urls"),
        ("teacher.weights=start", "is for another model than the student, not for teacher.weights=start"),
        ("teacher.parallel.tensor=2", "leave teacher.parallel alone"),
        ("teacher.parallel.pipeline=2 cluster.teacher_nodes=1", "leave teacher.parallel alone"),
        ("teacher.offload=false", "leave teacher.offload out"),
        (f"cluster.teacher_nodes=1 {SERVER}.urls=['http://a']", "are divided among the teachers"),
        ("cluster.teacher_nodes=1 objective.beta.init=0", "are divided among the teachers"),
        (f"{SEVERAL} {TOP_K}", "cannot have some teachers on completions servers and others (teachers.b)"),
        (
            f"{SEVERAL} {TOP_K} teachers.b.server.kind=completions teachers.b.values=[m,l]",
            "several teachers may teach one prompt, and the top k of completions servers do not give the mixture",
        ),
        (
            f"{SEVERAL} teachers.a.path=null teachers.b.path=null",
            "teachers.b.path is not set: name the teacher, or",
        ),
    ],
)
def test_what_a_server_cannot_give_or_nothing_reads_is_refused(settings: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(settings)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_no_weights_of_a_served_teacher_are_in_the_job() -> None:
    config = load(f"teacher.path=t {TOP_K} cluster.teacher_nodes=1 teacher.parallel.tensor=8")
    assert not teaches_itself(config) and not loaded_teachers(config) and list(served_teachers(config)) == ["teacher"]
    assert used_models(config) == {"student": "s"} and known_models(config) == {"student": "s", "teacher": "t"}
    assert ranks_per_node(config, 0) == 8 and ranks_per_node(load("cluster.gpus_per_node=1"), 0) == 1
    assert knows_top_k(config) and not teacher_heads(config)
    states = load(f"{STATES} teacher.path=t objective.kd.estimator=exact rollout.temperature=0.7")
    assert not knows_top_k(states) and list(teacher_heads(states)) == ["teacher"]
    mixed = load(f"{SEVERAL} objective.kd.estimator=exact teachers.a.server.kind=hidden_states")
    assert list(teacher_heads(mixed)) == ["a", "b"] and list(loaded_teachers(mixed)) == ["b"]


def test_a_teacher_may_move_to_a_server_and_back() -> None:
    here = flatten(asdict(load(f"{SERVER}.kind=none teacher.path=t")))
    there, without_path = (flatten(asdict(load(path))) for path in ("teacher.path=t", ""))
    for new in (there, without_path):
        assert refused(here, new, lambda key, old, now: key != "teacher.path" or old == now) == []
    other = flatten(asdict(load("teacher.path=u")))
    assert refused(here, other, lambda key, old, now: key != "teacher.path" or old == now) != []
