"""Every value of the objective's axes beyond the paper's (docs/method.md), on its own or two at a time, against the dense
reference: loss and the gradient of every parameter, on tensor, pipeline, context and data ranks with uneven lengths, an
all-incorrect group, and responses that hit their limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.agreement import JOINT, Case, check, check_two_updates
from tests.support.ranks import RankPool
from tests.support.zoo import TOKENS, Zoo

LAYOUTS = {
    "tp2": "parallel.tensor=2 batch.micro_tokens=60",
    "sp": "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=60",
    "pp2": "parallel.pipeline=2 batch.micro_tokens=40",
    "cp2": "parallel.context=2 batch.micro_tokens=60",
    "dp2": "batch.micro_tokens=60",
}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gate": ("tp2", {"combine": "gate"}),
    "gate, exact, sequence mean": ("cp2", {"combine": "gate", "estimator": "exact", "aggregation": "sequence_mean"}),
    "gate, groups without a correct response": ("dp2", {"combine": "gate", "mask": "group", "denominator": "unmasked"}),
    "sign": ("pp2", {"combine": "sign"}),
    "sign, exact": ("sp", {"combine": "sign", "estimator": "exact", "agree": 1.5, "differ": 0.5}),
    "sign of the advantage": ("dp2", {"combine": "sign", "signal": "advantage", "estimator": "k1"}),
    "relu": ("tp2", {"combine": "relu", "alpha": 0.0, "estimator": "k1"}),
    "relu of the advantage": ("cp2", {"combine": "relu", "signal": "advantage"}),
    "modulate": ("tp2", {"combine": "modulate", "beta": 0.6}),
    "modulate, upper bound": ("pp2", {"combine": "modulate", "bounds": "upper", "modulate_clip": 0.05}),
    "modulate, masked": ("dp2", {"combine": "modulate", "mask": "response", "correction": "truncate", "correction_bound": 1.1}),
    "ratio": ("tp2", {"combine": "ratio"}),
    "ratio, masked": ("cp2", {"combine": "ratio", "mask": "response", "beta": 0.7}),
    "entropy": ("tp2", {"token_weight": "entropy", "share": 0.3, "more": 0.4}),
    "entropy, normalised": ("cp2", {"token_weight": "entropy", "normalize": True, "mask": "response"}),
    "magnitude": ("pp2", {"token_weight": "magnitude", "estimator": "k1"}),
    "magnitude, gate": ("dp2", {"token_weight": "magnitude", "combine": "gate", "share": 0.25}),
    "prefix": ("dp2", {"token_weight": "prefix"}),
    "prefix of 4 tokens, exact": ("cp2", {"token_weight": "prefix", "first_tokens": 4, "estimator": "exact"}),
    "rising": ("tp2", {"token_weight": "rising", "rate": 2.0, "estimator": "k3"}),
    "rising, top-k, normalised": ("sp", {"token_weight": "rising", "estimator": "top_k", "top_k": 7, "normalize": True}),
    "pass rate": ("dp2", {"token_weight": "pass_rate", "unsolved": 2.0}),
    "trusted prefix": ("cp2", {"token_weight": "trusted_prefix"}),
    "trusted prefix, sign": ("pp2", {"token_weight": "trusted_prefix", "combine": "sign", "rate": 0.3}),
    "stop token left out": ("tp2", {"stop_token": "mask"}),
    "stop token left out, exact": ("dp2", {"stop_token": "mask", "estimator": "exact", "mask": "response"}),
    "prefix and placement advantage": ("tp2", {"token_weight": "prefix", "placement": "advantage"}),
    "forward": ("tp2", {"estimator": "exact", "divergence": "forward"}),
    "forward, cp2": ("cp2", {"estimator": "exact", "divergence": "forward", "temperature": 0.8, "combine": "sign"}),
    "jsd": ("sp", {"estimator": "exact", "divergence": "jsd", "jsd_beta": 0.3}),
    "jsd, masked": ("dp2", {"estimator": "exact", "divergence": "jsd", "mask": "response", "token_weight": "prefix"}),
    "forward top-k, truncated": (
        "tp2",
        {"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_support": "teacher", "top_k_tail": "truncate"},
    ),
    "forward top-k, renormalised": (
        "cp2",
        {"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_tail": "renormalize"},
    ),
    "forward top-k, student's set": ("pp2", {"estimator": "top_k", "divergence": "forward", "top_k": 7}),
    "top-k, corrected": ("sp", {"estimator": "top_k", "top_k": 7, "top_k_support": "teacher", "top_k_tail": "corrected"}),
    "mixed by entropy": (
        "tp2",
        {
            **{"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_support": "teacher"},
            **{"top_k_tail": "truncate", "mix": "entropy", "mix_above": 3.9},
        },
    ),
    "mixed by trust": (
        "cp2",
        {"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_support": "teacher", "mix": "trust"},
    ),
    "mixed by trust, gate": ("dp2", {"estimator": "exact", "divergence": "forward", "mix": "trust", "combine": "gate"}),
    "teacher's entropy": ("tp2", {"estimator": "exact", "token_weight": "teacher_entropy", "rate": 0.5, "combine": "gate"}),
    "teacher's entropy, jsd": ("cp2", {"estimator": "exact", "divergence": "jsd", "token_weight": "teacher_entropy"}),
    "bounded importance": ("tp2", {"importance": "truncate", "importance_bound": 1.05}),
    "bounded importance, k1": ("cp2", {"importance": "truncate", "importance_bound": 1.05, "estimator": "k1"}),
    "bounded importance, k3": ("pp2", {"importance": "mask", "importance_bound": 1.1, "estimator": "k3"}),
    "sequence correction": ("tp2", {"correction": "truncate", "correction_level": "sequence", "correction_bound": 1.2}),
    "sequence correction, masked": ("cp2", {"correction": "mask", "correction_level": "sequence", "correction_bound": 1.3}),
    "geometric correction": ("dp2", {"correction": "mask", "correction_level": "geometric", "correction_bound": 1.05}),
    "leave one out": ("tp2", {"baseline": "leave_one_out"}),
    "batch baseline": ("dp2", {"baseline": "batch", "truncated": "drop"}),
    "truncated left out, sequence mean": ("cp2", {"truncated": "drop", "aggregation": "sequence_mean"}),
    "cispo": ("tp2", {"policy_loss": "cispo"}),
    "cispo, corrected": ("pp2", {"policy_loss": "cispo", "correction": "truncate", "correction_bound": 1.1}),
    "entropy bonus": ("sp", {"entropy_bonus": 0.05}),
    "entropy bonus, cispo": ("cp2", {"entropy_bonus": 0.05, "policy_loss": "cispo", "combine": "sign"}),
}
FOUR_RANKS = {
    "gate, entropy": {"combine": "gate", "token_weight": "entropy"},
    "sign, exact, bounded": {"combine": "sign", "estimator": "exact", "stop_token": "mask"},
    "ratio, sequence correction": {
        "combine": "ratio",
        "correction": "truncate",
        "correction_level": "sequence",
        "correction_bound": 1.2,
    },
    "modulate, dropped": {"combine": "modulate", "truncated": "drop", "baseline": "leave_one_out"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_every_form_is_that_of_the_dense_reference(
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
"""With responses that were given beside the sampled ones."""


@pytest.mark.parametrize("form", GIVEN.values(), ids=list(GIVEN))
def test_given_responses_are_distilled_and_nothing_else(
    form: tuple[str, dict[str, Any]], zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    layout, changes = form
    check(Case(2, LAYOUTS[layout], replace(JOINT, **changes), given="given"), zoo, pools[2], tmp_path)


def test_given_responses_in_two_updates(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """With a sampler correction of whole sequences and a sequence ratio, which are none of theirs, as no drift is."""
    changes: dict[str, Any] = {"estimator": "exact", "divergence": "jsd", "ratio": "sequence", "clip_low": 0.003}
    changes |= {"correction": "truncate", "correction_level": "sequence", "correction_bound": 1.2}
    settings = replace(JOINT, vocab_size=TOKENS, **changes)
    metrics, results = check_two_updates(settings, LAYOUTS["dp2"], zoo, ranks2, tmp_path, None, given="given")
    sampled = zoo.rows("uneven")
    updates = zip([sampled[:4], sampled[4:]], results, strict=True)
    pairs = [pair for rows, result in updates for pair in zip(rows, result.log_probs, strict=False)]  # the sampled ones first
    drift = torch.cat([(log_probs - torch.tensor(row["sampler_log_probs"])).abs() for row, log_probs in pairs])
    assert metrics["drift_mean"] == pytest.approx(float(drift.mean()), rel=1e-4)
    assert metrics["drift_max"] == pytest.approx(float(drift.max()), rel=1e-4)
    assert metrics["corrected_share"] == 1 and metrics["given_responses"] == 6


@pytest.mark.parametrize("changes", FOUR_RANKS.values(), ids=list(FOUR_RANKS))
def test_tensor_and_pipeline_at_once(changes: dict[str, Any], zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    layout = "parallel.tensor=2 parallel.pipeline=2 batch.micro_tokens=40"
    check(Case(4, layout, replace(JOINT, **changes)), zoo, pools[4], tmp_path)


@pytest.mark.parametrize("combine", ["gate", "relu", "modulate"])
def test_a_batch_that_leaves_nothing_to_do(combine: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """Every response correct: no advantage, and nothing for a mask to keep."""
    changes: dict[str, Any] = {"combine": combine, "mask": "response", "signal": "advantage"}
    check(Case(2, LAYOUTS["dp2"], replace(JOINT, **changes), rollouts="all_correct"), zoo, pools[2], tmp_path)


LATER_UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence ratio": ("tp2", {"ratio": "sequence", "aggregation": "sequence_mean", "clip_low": 0.003, "clip_high": 0.003}),
    "sequence ratio, cp2": ("cp2", {"ratio": "sequence", "token_weight": "entropy"}),
    "sequence ratio, cispo": ("dp2", {"ratio": "sequence", "policy_loss": "cispo", "clip_high": 0.002}),
    "dual clip": ("tp2", {"dual_clip": 1.01, "clip_low": 0.05, "clip_high": 0.005}),
    "cispo": ("pp2", {"policy_loss": "cispo", "clip_high": 0.01}),
    "ratio": ("cp2", {"combine": "ratio", "clip_low": 0.05, "clip_high": 0.05}),
    "modulate": ("tp2", {"combine": "modulate", "clip_low": 0.05, "clip_high": 0.05}),
    "signed reference": ("tp2", {"combine": "reference", "alpha": 0.0, "reference_estimator": "k2"}),
    "signed reference, exact": (
        "pp2",
        {"combine": "reference", "extrapolation": 0.5, "estimator": "exact", "reference_estimator": "k2"},
    ),
    "sequence correction": ("cp2", {"correction": "truncate", "correction_level": "sequence", "correction_bound": 1.2}),
    "magnitude at the present weights": (
        "pp2",
        {"token_weight": "magnitude", "importance": "truncate", "importance_bound": 1.05},
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
