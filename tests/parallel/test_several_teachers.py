"""Several teachers: loss and gradient of every parameter agree with the dense reference, where each response has one teacher of
another family and size than the other's, both of them, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.reference import dense
from tests.reference.tiny_models import read_hf_weights, write_jsonl
from tests.support.agreement import SETTINGS, about, assert_gradients
from tests.support.ranks import RankPool
from tests.support.training import (
    FAST,
    PROBE,
    PROBE_LR,
    metrics_of,
    objective_overrides,
    score_in_parts_and_train_on_rank,
    train_on_rank,
)
from tests.support.zoo import Zoo

TEACHERS = {"one": "teacher", "two": "granite"}
SHARES = {"one": 1.0, "two": 0.5}
VALUES = {"one": ("a", "both"), "two": ("b", "both")}
EVERY = ("a",) * 4 + ("both",) * 2 + ("b",) * 3 + ("nobody",) * 3
"""The domains of twelve responses."""
FEW = ("nobody",) * 11 + ("both",)
"""One response with teachers: one of two data-parallel ranks has none."""
K2, EXACT = SETTINGS, replace(SETTINGS, estimator="exact")
TOP_K = replace(SETTINGS, estimator="top_k", top_k=7, top_k_tail="bucket")
LAYOUTS = {
    "tp2 pp2": (
        4,
        "parallel.tensor=2 parallel.pipeline=2 teachers.one.parallel.pipeline=2 teachers.two.parallel.tensor=2",
        EVERY,
    ),
    "cp2": (2, "parallel.context=2 teachers.one.parallel.tensor=2", EVERY),
    "dp2, one rank without a teacher": (2, "teachers.two.parallel.pipeline=2", FEW),
}
ESTIMATORS = {"k2": K2, "exact": EXACT, "top_k": TOP_K}


@dataclass(frozen=True)
class Run:
    """A run of two teachers: its objective, the domain of each response, and the mixture."""

    settings: dense.Settings
    domains: tuple[str, ...] = EVERY
    mixture: str = "geometric"


@cache
def expected_of(folder: Path, run: Run) -> dense.Result:
    """The dense reference: each teacher's full distribution, and their mixture by its definition."""
    zoo, settings = Zoo(folder), run.settings
    rows = [{**row, "domain": domain} for row, domain in zip(zoo.rows("uneven"), run.domains, strict=True)]
    models = {name: dense.load_model(zoo.model(model)) for name, model in TEACHERS.items()}
    taught = [_taught(row, models, run) for row in rows]
    student = dense.load_model(zoo.model("untied"))
    return dense.kdrl_of_models(student, None, rows, settings, taught=taught)


def _taught(row: dense.Row, models: Mapping[str, object], run: Run) -> dense.Taught:
    settings, log_qs, shares = run.settings, [], []
    for name, model in models.items():
        if row["domain"] in VALUES[name]:
            with torch.no_grad():
                log_qs.append(dense.response_logits(model, row, settings.vocab_size, settings.temperature).log_softmax(-1))
            shares.append(SHARES[name])
    if not log_qs:
        nothing = torch.zeros(len(row["response_token_ids"]), settings.vocab_size, dtype=torch.float64)
        return dense.Taught(nothing.log_softmax(-1), 0.0)
    parts = [share / sum(shares) for share in shares]
    if run.mixture == "arithmetic":
        log_q = sum(a * each.exp() for a, each in zip(parts, log_qs, strict=True)).log()
    else:
        log_q = sum(a * each for a, each in zip(parts, log_qs, strict=True))
        if settings.estimator not in ("k1", "k2"):
            log_q = log_q.log_softmax(-1)
    return dense.Taught(log_q, sum(shares))


def overrides_of(zoo: Zoo, folder: Path, run: Run) -> list[str]:
    rows = [{**row, "domain": domain} for row, domain in zip(zoo.rows("uneven"), run.domains, strict=True)]
    write_jsonl(folder / "rollouts.jsonl", rows)
    teachers = [
        word
        for name, model in TEACHERS.items()
        for word in (
            f"teachers.{name}.path={zoo.model(model)}",
            f"teachers.{name}.values=[{','.join(VALUES[name])}]",
            f"teachers.{name}.share.init={SHARES[name]}",
        )
    ]
    return [
        f"run.dir={folder / 'run'}",
        f"student.path={zoo.model('untied')}",
        *teachers,
        "rollout=replay",
        f"rollout.path={folder / 'rollouts.jsonl'}",
        *objective_overrides(run.settings),
        f"objective.kd.mixture={run.mixture}",
        "batch.micro_tokens=40",
        *FAST,
    ]


def check(run: Run, ranks: int, layout: str, zoo: Zoo, pool: RankPool, folder: Path, on_rank=train_on_rank) -> dict[str, float]:
    expected = expected_of(zoo.folder, run)
    outcomes = pool.run(on_rank, [*overrides_of(zoo, folder, run), *PROBE, *layout.split()])
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    (metrics,) = metrics_of(folder / "run")
    for name in ("loss", "policy_loss", "kd_loss", "grad_norm"):
        assert metrics[name] == about(getattr(expected, name)), name
    before, after = read_hf_weights(zoo.model("untied")), read_hf_weights(folder / "run" / "hf")
    assert_gradients({name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}, expected.gradients)
    lengths = [len(row["response_token_ids"]) for row in zoo.rows("uneven")]
    assert metrics["untaught_responses"] == run.domains.count("nobody")
    for name, values in VALUES.items():
        own = [length for length, domain in zip(lengths, run.domains, strict=True) if domain in values]
        assert (metrics[f"teacher/{name}/responses"], metrics[f"teacher/{name}/tokens"]) == (len(own), sum(own))
    return metrics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_unlike_teachers_agree_with_the_dense_reference(
    estimator: str, layout: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    ranks, overrides, domains = LAYOUTS[layout]
    run = Run(ESTIMATORS[estimator], domains)
    metrics = check(run, ranks, overrides, zoo, pools[ranks], tmp_path)
    expected, rows = expected_of(zoo.folder, run), zoo.rows("uneven")
    for name, values in VALUES.items():
        own = [i for i in range(len(rows)) if domains[i] in values]
        d = torch.cat([expected.log_probs[i] - expected.teacher_log_probs[i] for i in own])
        assert metrics[f"teacher/{name}/kl"] == about(float(d.mean()))
        assert ("kl_full" in str([key for key in metrics if key.startswith(f"teacher/{name}/")])) == (estimator != "k2")


def test_an_arithmetic_mixture_scored_in_parts_agrees_with_the_dense_reference(
    zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    domains = ("a", "both", "b", "both") * 3
    run = Run(replace(SETTINGS, estimator="k3"), domains, mixture="arithmetic")
    layout = "parallel.tensor=2 teachers.two.parallel.pipeline=2"
    metrics = check(run, 2, layout, zoo, pools[2], tmp_path, score_in_parts_and_train_on_rank)
    assert 0 < metrics["teacher_tokens_early"] < metrics["teacher_tokens"]
