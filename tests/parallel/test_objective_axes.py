"""Every pair of values of the objective's axes (docs/method.md, tests/support/axes.py), and the further settings of each value,
agree with the dense reference in the loss and the gradient of every parameter. The layouts are tensor, pipeline, context and
data parallel; lengths are uneven, one group is all incorrect, and some responses reach their limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.agreement import JOINT, Case, check, check_two_updates
from tests.support.axes import CASES, TEACHERS_TOP_K, settings_of, values_of
from tests.support.ranks import RankPool
from tests.support.zoo import TOKENS, Zoo

LAYOUTS = {
    "tp2": "parallel.tensor=2 batch.micro_tokens=60",
    "sp": "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=60",
    "pp2": "parallel.pipeline=2 batch.micro_tokens=40",
    "cp2": "parallel.context=2 batch.micro_tokens=60",
    "dp2": "batch.micro_tokens=60",
}
TENSOR_AND_PIPELINE = "parallel.tensor=2 parallel.pipeline=2 batch.micro_tokens=40"


def check_case(case: str, layout: str, zoo: Zoo, pool: RankPool, run: Path) -> None:
    """A line of `tests.support.axes.CASES`, in one update, or in two updates, the second of which is off-policy."""
    settings = settings_of(case.split(), replace(JOINT, vocab_size=TOKENS))
    if values_of(case)["updates"] == "one-update":
        check(Case(pool.world_size, layout, settings), zoo, pool, run)
    else:
        check_two_updates(settings, layout, zoo, pool, run, "untied" if settings.combine == "reference" else None, lr=4.0)


@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_values_is_that_of_the_dense_reference(
    case: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check_case(case, LAYOUTS[values_of(case)["layout"]], zoo, pools[2], tmp_path)


@pytest.mark.parametrize("case", CASES[::12])
def test_tensor_and_pipeline_at_once(case: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check_case(case, TENSOR_AND_PIPELINE, zoo, pools[4], tmp_path)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sign of the advantage": ("dp2", {"combine": "sign", "signal": "advantage", "agree": 1.5, "differ": 0.5}),
    "relu of the verdict": ("tp2", {"combine": "relu", "alpha": 0.0, "estimator": "k1"}),
    "modulate, upper bound": ("pp2", {"combine": "modulate", "bounds": "upper", "modulate_clip": 0.05}),
    "entropy, normalised": ("cp2", {"token_weight": "entropy", "normalize": True, "mask": "response"}),
    "entropies of the batch": (
        "cp2",
        {"token_weight": "entropy", "over": "batch", "share": 0.3, "more": 0.4, "mask": "response", "stop_token": "mask"},
    ),
    "magnitudes of the batch, pipelined": ("pp2", {"token_weight": "magnitude", "over": "batch", "normalize": True}),
    "magnitudes of the batch, on data ranks": ("dp2", {"token_weight": "magnitude", "over": "batch", "share": 0.2}),
    "magnitude of an exact divergence": ("pp2", {"token_weight": "magnitude", "estimator": "exact", "normalize": True}),
    "teacher's entropy, normalised": (
        "tp2",
        {"estimator": "exact", "token_weight": "teacher_entropy", "normalize": True, "combine": "gate"},
    ),
    "teacher's entropy, sampled": ("dp2", {"token_weight": "teacher_entropy", "mask": "response"}),
    "prefix of 4 tokens, exact": ("cp2", {"token_weight": "prefix", "first_tokens": 4, "estimator": "exact"}),
    "prefix of 4 tokens, top-k": ("sp", {"token_weight": "prefix", "first_tokens": 4, "estimator": "top_k", "top_k": 7}),
    "k1": ("cp2", {"estimator": "k1", "token_weight": "prefix"}),
    "k2 without its expectation": ("tp2", {"control_variate": True}),
    "k3": ("pp2", {"estimator": "k3", "importance": "mask", "importance_bound": 1.1}),
    "forward": ("cp2", {"estimator": "exact", "divergence": "forward", "temperature": 0.8}),
    "forward with bounded entries": (
        "tp2",
        {"estimator": "exact", "divergence": "forward", "entry_clip": 0.01, "token_weight": "rising", "temperature": 0.8},
    ),
    "forward top-k, renormalised": (
        "cp2",
        {"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_tail": "renormalize"},
    ),
    "forward top-k, student's set": ("pp2", {"estimator": "top_k", "divergence": "forward", "top_k": 7}),
    "top-k, corrected": ("sp", {"estimator": "top_k", "top_k": 7, "top_k_support": "teacher", "top_k_tail": "corrected"}),
    "top-k Jensen-Shannon": ("tp2", {"estimator": "top_k", "divergence": "jsd", "top_k": 7, "jsd_beta": 0.3}),
    "top-k Jensen-Shannon, truncated": (
        "dp2",
        {"estimator": "top_k", "divergence": "jsd", "top_k": 7, "top_k_support": "teacher", "top_k_tail": "truncate"},
    ),
    "mixed by entropy": (
        "tp2",
        {**TEACHERS_TOP_K, "top_k_tail": "truncate", "mix": "entropy", "mix_above": 3.9},
    ),
    "mixed by entropy, in the advantage": (
        "cp2",
        {
            **TEACHERS_TOP_K,
            "top_k_tail": "truncate",
            "mix": "entropy",
            "mix_above": 3.9,
            "placement": "advantage",
            "alpha": 0.0,
        },
    ),
    "mixed by trust": ("cp2", {**TEACHERS_TOP_K, "mix": "trust"}),
    "mixed by trust, exact": ("dp2", {"estimator": "exact", "divergence": "forward", "mix": "trust", "combine": "gate"}),
    "bounded importance": ("tp2", {"importance": "truncate", "importance_bound": 1.05}),
    "importance of the sequence": ("cp2", {"importance_level": "sequence", "estimator": "k1"}),
    "sequence correction, masked": ("cp2", {"correction": "mask", "correction_level": "sequence", "correction_bound": 1.3}),
    "ratio to the sampler": ("tp2", {"clip_against": "sampler", "clip_low": 0.05, "clip_high": 0.05}),
    "sequence ratio to the sampler": (
        "cp2",
        {"clip_against": "sampler", "ratio": "sequence", "clip_low": 0.01, "clip_high": 0.01},
    ),
    "signed reference, some of it taught": (
        "dp2",
        {"combine": "reference", "reference_estimator": "k2", "mask": "response", "stop_token": "mask"},
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_every_other_form_is_that_of_the_dense_reference(
    form: tuple[str, dict[str, Any]], zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    layout, changes = form
    check(Case(2, LAYOUTS[layout], replace(JOINT, **changes)), zoo, pools[2], tmp_path)


GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "jsd": ("dp2", {"estimator": "exact", "divergence": "jsd", "alpha": 0.0}),
    "forward, with a policy loss": ("tp2", {"estimator": "exact", "divergence": "forward", "correction": "truncate"}),
    "reverse, gate, masked": ("cp2", {"estimator": "exact", "combine": "gate", "mask": "group", "denominator": "unmasked"}),
    "top-k, masked, batch baseline": ("pp2", {"estimator": "top_k", "top_k": 7, "mask": "response", "baseline": "batch"}),
    "forward top-k, prefix, stop token, entropy bonus": (
        "sp",
        {
            **{"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_support": "teacher", "entropy_bonus": 0.05},
            **{"token_weight": "prefix", "normalize": True, "stop_token": "mask", "aggregation": "sequence_mean"},
        },
    ),
}
"""Cases with given responses in addition to the sampled ones."""


@pytest.mark.parametrize("form", GIVEN.values(), ids=list(GIVEN))
def test_given_responses_are_distilled_and_nothing_else(
    form: tuple[str, dict[str, Any]], zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    layout, changes = form
    check(Case(2, LAYOUTS[layout], replace(JOINT, **changes), given="given"), zoo, pools[2], tmp_path)


def test_given_responses_in_two_updates(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """The run has a sampler correction of whole sequences and a sequence ratio. Neither applies to given responses, and they
    have no drift."""
    changes: dict[str, Any] = {"estimator": "exact", "divergence": "jsd", "ratio": "sequence", "clip_low": 0.003}
    changes |= {"correction": "truncate", "correction_level": "sequence", "correction_bound": 1.2}
    settings = replace(JOINT, vocab_size=TOKENS, **changes)
    metrics, results = check_two_updates(settings, LAYOUTS["dp2"], zoo, ranks2, tmp_path, None, given="given")
    sampled = zoo.rows("uneven")
    updates = zip([sampled[:4], sampled[4:]], results, strict=True)
    pairs = [pair for rows, result in updates for pair in zip(rows, result.log_probs, strict=False)]  # sampled ones first
    drift = torch.cat([(log_probs - torch.tensor(row["sampler_log_probs"])).abs() for row, log_probs in pairs])
    assert metrics["drift_mean"] == pytest.approx(float(drift.mean()), rel=1e-4)
    assert metrics["drift_max"] == pytest.approx(float(drift.max()), rel=1e-4)
    assert metrics["corrected_share"] == 1 and metrics["given_responses"] == 6


@pytest.mark.parametrize("combine", ["gate", "relu", "modulate"])
def test_a_batch_that_leaves_nothing_to_do(combine: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """Every response is correct: there is no advantage, and nothing for a mask to keep."""
    changes: dict[str, Any] = {"combine": combine, "mask": "response"} | ({"signal": "advantage"} if combine == "relu" else {})
    check(Case(2, LAYOUTS["dp2"], replace(JOINT, **changes), rollouts="all_correct"), zoo, pools[2], tmp_path)


LATER_UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence ratio": ("tp2", {"ratio": "sequence", "aggregation": "sequence_mean", "clip_low": 0.003, "clip_high": 0.003}),
    "sequence ratio, cispo": ("dp2", {"ratio": "sequence", "policy_loss": "cispo", "clip_high": 0.002}),
    "ratio to the sampler": ("pp2", {"clip_against": "sampler", "clip_low": 0.05, "clip_high": 0.05}),
    "product ratio": (
        "cp2",
        {
            "ratio": "product",
            "aggregation": "sequence_sum_norm",
            "max_response_tokens": 20,
            "clip_low": 0.05,
            "clip_high": 0.02,
        },
    ),
    "dual clip": ("tp2", {"dual_clip": 1.01, "clip_low": 0.05, "clip_high": 0.005}),
    "cispo": ("pp2", {"policy_loss": "cispo", "clip_high": 0.01}),
    "ratio": ("cp2", {"combine": "ratio", "clip_low": 0.05, "clip_high": 0.05}),
    "modulate": ("tp2", {"combine": "modulate", "clip_low": 0.05, "clip_high": 0.05}),
    "signed reference, some of it taught": (
        "pp2",
        {
            **{"combine": "reference", "alpha": 0.0, "reference_estimator": "k2", "mask": "response", "stop_token": "mask"},
            **{"importance": "truncate", "importance_bound": 1.05, "token_weight": "prefix"},
        },
    ),
    "signed reference, exact": (
        "pp2",
        {"combine": "reference", "extrapolation": 0.5, "estimator": "exact", "reference_estimator": "k2"},
    ),
}


@pytest.mark.parametrize("form", LATER_UPDATES.values(), ids=list(LATER_UPDATES))
def test_a_second_update_is_off_policy(form: tuple[str, dict[str, Any]], zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    layout, changes = form
    settings = replace(JOINT, vocab_size=TOKENS, **changes)
    reference = "untied" if settings.combine == "reference" else None
    metrics, _ = check_two_updates(settings, LAYOUTS[layout], zoo, ranks2, tmp_path, reference)
    if "clip_high" in changes:
        assert metrics["clip_share"] > 0.01
