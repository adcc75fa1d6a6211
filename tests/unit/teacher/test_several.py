"""Several teachers: their settings, the prompts that each teaches, their mixtures, and what is planned and watched for each."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from kdrl_mcore.config import (
    Config,
    NamedTeacherConfig,
    ScheduleConfig,
    check_config,
    flatten,
    load_config,
    load_saved,
    save_config,
)
from kdrl_mcore.config.derived import may_teach_together, used_models
from kdrl_mcore.config.overrides import apply, read_overrides
from kdrl_mcore.config.resuming import changes, refused, restarted
from kdrl_mcore.data.taught import count_taught, describe_taught
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.alerts import AlertThresholds, AlertWatch
from kdrl_mcore.objective.schedules import Coefficient
from kdrl_mcore.teacher.mixture import MIXTURES, portions
from kdrl_mcore.teacher.pool import Member, TeacherPool
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.types import Prompt, Rollout

DATA = "data.sources=[{path: m.jsonl, name: maths}, {path: l.jsonl, name: logic, weight: 3}]"
APART = ("teachers.m.path=M", "teachers.m.values=[maths]", "teachers.l.path=L", "teachers.l.values=[logic]")
TOGETHER = (*APART, "teachers.l.values=[logic,maths]")


@cache
def base() -> Config:
    return load_config(["objective=kdrl", "student.path=s", DATA, *APART])


def load(*settings: str) -> Config:
    """The configuration with these overrides, composed only once."""
    composed = OmegaConf.structured(deepcopy(base()))
    for each in read_overrides(settings, ()):
        apply(composed, each.name, each.value, each.word)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    check_config(config)
    return config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("teacher.path=t",), "teacher and teachers are both set"),
        (("teachers.m.path=null",), "teachers.m.path is not set"),
        (
            ("teachers.m.values=[math]",),
            "no domain of data.sources is called 'math'; there are: maths, logic; did you mean 'maths'?",
        ),
        (("teachers.m.values=[maths,maths]",), "names a value twice"),
        (("teachers.m.column=kind",), "add it to data.columns"),
        (("teachers.m.column=kind", "teachers.m.values=[]"), "without teachers.m.values teaches every prompt"),
        (
            ("teachers.m.column=kind", "data.columns=[kind]", "rollout.engine=replay", "rollout.path=r.jsonl"),
            "with rollout=replay choose by domain",
        ),
        (("teachers.m.share.init=0",), "teachers.m.share is never positive"),
        (("teachers.m.share.init=-1",), "teachers.m.share.init=-1 must be at least 0"),
        (("teachers.m.share.kind=steady",), "teachers.m.share.kind=steady is not one of"),
        (("teachers.m.share.kind=adaptive",), "needs teachers.m.share.target > 0"),
        (("teachers.m.prompt.max_tokens=9",), "teachers.m.prompt.max_tokens has no effect"),
        (("teachers.m.paht=x",), "unknown configuration key 'teachers.m.paht'"),
        (("teachers.a-b.path=x",), "a name consists of letters, digits and _"),
        (("teachers.teacher.path=x",), "choose another name than teacher"),
        (("teachers.m=M",), "'teachers.m' is a section"),
        (("objective.combine.kind=modulate",), "has one beta for all prompts"),
        ((*TOGETHER, "objective.kd.estimator=k3"), "objective.kd.estimator=k3 needs the log-probs of their normalised"),
        ((*TOGETHER, "objective.kd.clamp=3"), "objective.kd.clamp=3.0 needs"),
        ((*TOGETHER, "objective.kd.placement=reward"), "objective.kd.placement=reward needs"),
        ((*TOGETHER, "objective.combine.kind=sign"), "objective.combine.kind=sign needs"),
        ((*TOGETHER, "objective.kd.token_weight.kind=entropy"), "objective.kd.token_weight.kind=entropy needs"),
        ((*TOGETHER, "objective.kd.estimator=exact", "objective.kd.mixture=arithmetic"), "only k1, k2 and k3 are exact"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(*APART, *settings)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_the_configuration_is_read_back_and_a_teacher_is_known_by_its_name(tmp_path: Path) -> None:
    config = load("teachers.m={path: M, values: [maths], parallel: {tensor: 2}}", *APART[2:], "teachers.m.share.init=0.3")
    assert (config.teachers["m"].parallel.tensor, config.teachers["m"].share.init) == (2, 0.3)
    assert used_models(config) == {"student": "s", "teacher m": "M", "teacher l": "L"}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert load_saved(flatten(asdict(config))).teachers == config.teachers
    assert not may_teach_together(config) and may_teach_together(load(*TOGETHER))
    assert may_teach_together(load(*APART, "data.columns=[kind]", "teachers.m.column=kind"))
    load(*TOGETHER, "objective.kd.estimator=k3", "objective.kd.mixture=arithmetic")


def test_shares_change_on_resuming_and_models_do_not() -> None:
    def flat(*settings: str) -> dict:
        return flatten(asdict(load(*APART, *settings)))

    old, faster, other, third = flat(), flat("teachers.m.share.init=2"), flat("teachers.m.path=O"), flat("teachers.x.path=X")
    assert [str(each) for each in changes(old, faster)] == ["teachers.m.share.init: 1.0 -> 2.0"]
    assert restarted(old, faster) == {"teachers.m.share"}
    assert refused(old, other, lambda key, before, now: before == now) == [
        "teachers.m.path: M -> O (the models that teach, if they taught before)"
    ]
    assert refused(old, third, lambda key, before, now: before == now) == []
    assert "teachers.x.path: null -> X" in [str(each) for each in changes(old, third)]


def prompts(*kinds: tuple[str, object]) -> list[Prompt]:
    ids = np.zeros(1, np.int64)
    return [Prompt("p", "", ids, "", None, domain, {} if kind is None else {"kind": kind}) for domain, kind in kinds]


def test_prompts_are_assigned_by_a_column_and_those_without_a_teacher_are_counted() -> None:
    kinds = ("data.columns=[kind]", "teachers.l.column=kind", "teachers.l.values=['2']")
    config = load(*APART, *kinds)
    items = prompts(("maths", 1), ("maths", 2), ("logic", 2), ("logic", 3), ("logic", None))
    taught = count_taught(config, items)
    assert (taught.prompts, taught.by_none, taught.by_several) == ({"m": 2, "l": 2}, 2, 1)
    assert describe_taught(config, [items]) == [
        "prompts taught by each teacher: m 2, l 2; 1 by several; 2 by none: these are not distilled"
    ]
    with pytest.raises(DataError, match="no prompt has '2' in the column kind; there are: '1'"):
        count_taught(config, items[:1])


def test_the_geometric_mixture_is_the_weighted_sum_of_the_teachers_divergences() -> None:
    torch.manual_seed(0)
    z = torch.randn(9, dtype=torch.float64, requires_grad=True)
    log_ts, shares = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1), torch.tensor([0.7, 0.2], dtype=torch.float64)
    log_p = z.log_softmax(-1)
    parts = torch.tensor(list(portions({"a": 0.7, "b": 0.2}).values()), dtype=torch.float64)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, z, retain_graph=True)[0]

    def kl(log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum()

    wanted = gradient(sum(c * kl(log_t) for c, log_t in zip(shares, log_ts, strict=True)))
    unnormalised = (parts[:, None] * log_ts).sum(0)
    torch.testing.assert_close(gradient(shares.sum() * kl(unnormalised.log_softmax(-1))), wanted)
    d = (unnormalised - log_p).detach()  # without log Z, as k1 and k2 see it
    for term in (0.5 * (unnormalised - log_p).square(), -d * log_p):
        torch.testing.assert_close(gradient(shares.sum() * (log_p.exp().detach() * term).sum()), wanted)
    numbers = [each.numpy().astype(np.float32) for each in log_ts]
    arithmetic = (parts[:, None] * log_ts.exp()).sum(0).log()
    for name, truth in (("geometric", unnormalised), ("arithmetic", arithmetic)):
        np.testing.assert_allclose(MIXTURES[name](numbers, parts.tolist()), truth.numpy(), rtol=1e-5)


class Recorder:
    """A source of scores that notes what it is asked for, and always gives the same log-prob."""

    chunks = ()

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, list[list[int]]()

    def scores_of(self, rollouts, wanted, *, temperature, micro_tokens) -> TeacherScores:
        self.asked.append(list(rollouts))
        lengths = {index: len(each.response_token_ids) for index, each in rollouts.items()}
        return TeacherScores(lengths, log_probs={i: np.full(n, self.value, np.float32) for i, n in lengths.items()})


def test_each_teacher_scores_only_its_own_responses_and_none_while_its_share_is_zero() -> None:
    sources = {"m": Recorder(-1.0), "l": Recorder(-3.0)}
    settings = {"m": NamedTeacherConfig("M", values=["maths", "both"]), "l": NamedTeacherConfig("L", values=["logic", "both"])}
    shares = {"m": ScheduleConfig(init=1.0), "l": ScheduleConfig("linear", init=3.0, delta=3.0)}
    pool = TeacherPool({n: Member(settings[n], Coefficient(shares[n]), sources[n], 4) for n in sources}, "geometric")
    ids, mu = np.zeros(3, np.int64), np.zeros(3, np.float32)
    domains = ("maths", "logic", "both", "other")
    rollouts = [Rollout("p", 0, ids, ids, mu, "stop", 0, domain=domain) for domain in domains]
    assert pool.total_shares(rollouts).tolist() == [1.0, 3.0, 4.0, 0.0]
    assert pool.taught_by(rollouts).tolist() == [0b01, 0b10, 0b11, 0]
    taught = {index: rollouts[index] for index in (0, 1, 2)}
    scores = pool.scores_of(taught, frozenset({"log_probs"}), temperature=1.0, micro_tokens=8)
    assert {name: source.asked for name, source in sources.items()} == {"m": [[0, 2]], "l": [[1, 2]]}
    assert [float(scores.log_probs[i][0]) for i in (0, 1, 2)] == [-1.0, -3.0, -2.5] and scores.tokens == 9
    pool.shares["l"].advance(None)
    assert pool.total_shares(rollouts).tolist() == [1.0, 0.0, 1.0, 0.0]
    pool.scores_of({2: rollouts[2]}, frozenset({"log_probs"}), temperature=1.0, micro_tokens=8)
    assert sources["l"].asked == [[1, 2]]


def test_an_alert_names_the_teacher_from_which_the_student_moves_away() -> None:
    watch = AlertWatch(thresholds=replace(AlertThresholds(), window=2, teachers=("m", "l")))
    found = []
    for step in range(8):
        kl_of_l = 0.2 if step < 4 else 0.9
        found += watch.observe({"kl": kl_of_l, "teacher/m/kl": 0.3, "teacher/l/kl": kl_of_l})
    assert [each.name for each in found] == ["kl_blow_up of l"]
    assert "KL to the teacher l rose to 0.550 from 0.200" in found[0].message
