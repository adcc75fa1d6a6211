"""The axes of the objective as settings of the dense reference, and cases that compare every pair of their values with it.

A case is a line of the values that are not the first of their axes. `tests/unit/objective/test_axes_pairs.py` checks that
every pair of values of two axes occurs in some case or is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

from tests.reference.dense import Settings

Changes = dict[str, Any]
Value = tuple[str, str]
"""An axis and the name of one of its values."""

TEACHERS_TOP_K: Changes = {"estimator": "top_k", "divergence": "forward", "top_k": 7, "top_k_support": "teacher"}
AXES: dict[str, dict[str, Changes]] = {
    "layout": {"tp2": {}, "sp": {}, "pp2": {}, "cp2": {}, "dp2": {}},
    "updates": {"one-update": {}, "two-updates": {}},
    "combine": {
        "add": {},
        "gate": {"combine": "gate"},
        "sign": {"combine": "sign"},
        "relu": {"combine": "relu", "signal": "advantage"},
        "modulate": {"combine": "modulate"},
        "ratio": {"combine": "ratio"},
        "signed-reference": {"combine": "reference", "reference_estimator": "k2"},
    },
    "token weight": {
        "constant": {},
        "entropy": {"token_weight": "entropy", "share": 0.3, "more": 0.4},
        "magnitude": {"token_weight": "magnitude"},
        "prefix": {"token_weight": "prefix"},
        "rising": {"token_weight": "rising"},
        "pass-rate": {"token_weight": "pass_rate", "unsolved": 2.0},
        "trusted-prefix": {"token_weight": "trusted_prefix"},
        "teacher-entropy": {"token_weight": "teacher_entropy", "rate": 0.5},
    },
    "divergence": {
        "k2": {},
        "centred": {"estimator": "k1", "control_variate": True},
        "exact": {"estimator": "exact"},
        "jsd": {"estimator": "exact", "divergence": "jsd", "jsd_beta": 0.3},
        "forward-top-k": TEACHERS_TOP_K,
        "drawn-trust": {**TEACHERS_TOP_K, "mix": "drawn_trust"},
    },
    "placement": {"in-loss": {}, "in-advantage": {"placement": "advantage"}, "in-reward": {"placement": "reward"}},
    "policy loss": {
        "clip": {},
        "dual-clip": {"dual_clip": 1.01, "clip_low": 0.05, "clip_high": 0.005},
        "cispo": {"policy_loss": "cispo", "clip_high": 0.002},
    },
    "ratio": {"of-token": {}, "of-sequence": {"ratio": "sequence"}},
    "baseline": {
        "group-mean": {},
        "leave-one-out": {"baseline": "leave_one_out"},
        "batch": {"baseline": "batch"},
        "undivided": {"normalize_by_std": False},
    },
    "correction": {
        "uncorrected": {},
        "truncate": {"correction": "truncate", "correction_bound": 1.1},
        "sequence-truncate": {"correction": "truncate", "correction_level": "sequence", "correction_bound": 1.2},
        "geometric-mask": {"correction": "mask", "correction_level": "geometric", "correction_bound": 1.05},
    },
    "importance": {
        "full": {},
        "kd-sequence": {"importance": "truncate", "importance_level": "sequence", "importance_bound": 1.3},
        "kd-geometric": {"importance": "mask", "importance_level": "geometric", "importance_bound": 1.05},
    },
    "mask": {"unmasked": {}, "response-mask": {"mask": "response"}, "group-mask": {"mask": "group", "denominator": "unmasked"}},
    "stop token": {"kept": {}, "stop-masked": {"stop_token": "mask"}},
    "truncated": {"all-kept": {}, "dropped": {"truncated": "drop"}},
    "aggregation": {
        "token-mean": {},
        "sequence-mean": {"aggregation": "sequence_mean"},
        "sequence-sum": {"aggregation": "sequence_sum_norm", "max_response_tokens": 20},
    },
    "entropy bonus": {"no-bonus": {}, "bonus": {"entropy_bonus": 0.3}},
}
AXIS_OF = {name: axis for axis, values in AXES.items() for name in values}

CASES = (
    "dp2 rising centred in-advantage dual-clip of-sequence batch sequence-truncate sequence-mean bonus",
    "pp2 two-updates gate drawn-trust leave-one-out kd-geometric group-mask stop-masked dropped bonus",
    (
        "cp2 two-updates sign teacher-entropy cispo of-sequence "
        "undivided truncate kd-sequence response-mask stop-masked sequence-sum"
    ),
    "signed-reference entropy exact geometric-mask response-mask dropped sequence-sum",
    "sp two-updates relu trusted-prefix dual-clip batch geometric-mask kd-geometric stop-masked dropped sequence-mean",
    "sp prefix drawn-trust in-advantage cispo undivided truncate group-mask",
    (
        "dp2 two-updates signed-reference pass-rate forward-top-k cispo "
        "of-sequence sequence-truncate group-mask stop-masked dropped bonus"
    ),
    "pp2 gate magnitude jsd cispo of-sequence leave-one-out sequence-mean",
    "cp2 in-reward of-sequence geometric-mask group-mask sequence-mean bonus",
    (
        "two-updates sign magnitude drawn-trust dual-clip undivided "
        "sequence-truncate kd-sequence response-mask dropped sequence-mean bonus"
    ),
    "two-updates prefix centred in-advantage of-sequence leave-one-out truncate stop-masked dropped sequence-sum bonus",
    "dp2 relu pass-rate of-sequence undivided kd-geometric response-mask sequence-sum",
    "cp2 two-updates signed-reference entropy drawn-trust dual-clip of-sequence batch kd-sequence stop-masked bonus",
    "sp sign trusted-prefix forward-top-k of-sequence leave-one-out sequence-truncate response-mask sequence-sum",
    "pp2 two-updates gate rising jsd dual-clip batch truncate response-mask stop-masked dropped sequence-sum bonus",
    "relu rising cispo of-sequence leave-one-out geometric-mask kd-sequence group-mask stop-masked",
    "sp two-updates sign teacher-entropy exact dual-clip of-sequence group-mask stop-masked bonus",
    "cp2 two-updates ratio cispo batch sequence-truncate group-mask stop-masked dropped sequence-sum",
    "dp2 two-updates modulate dual-clip leave-one-out truncate sequence-mean",
    "pp2 signed-reference teacher-entropy centred cispo undivided geometric-mask dropped sequence-mean",
    "pp2 two-updates gate prefix forward-top-k dual-clip geometric-mask stop-masked sequence-mean bonus",
    "cp2 two-updates relu magnitude of-sequence truncate kd-geometric group-mask stop-masked sequence-sum bonus",
    "dp2 trusted-prefix drawn-trust cispo of-sequence kd-sequence response-mask dropped bonus",
    "two-updates sign pass-rate drawn-trust batch geometric-mask kd-sequence stop-masked sequence-mean",
    (
        "dp2 two-updates gate entropy exact cispo "
        "of-sequence undivided sequence-truncate group-mask stop-masked sequence-mean bonus"
    ),
    "pp2 two-updates in-reward dual-clip undivided sequence-truncate response-mask stop-masked dropped",
    "modulate of-sequence batch group-mask stop-masked dropped sequence-sum bonus",
    "signed-reference trusted-prefix jsd undivided truncate group-mask dropped",
    "cp2 signed-reference prefix cispo of-sequence leave-one-out sequence-truncate kd-geometric response-mask sequence-mean",
    "sp ratio undivided truncate bonus",
    "cp2 two-updates pass-rate exact dual-clip leave-one-out truncate stop-masked dropped bonus",
    "cp2 two-updates rising centred in-advantage of-sequence stop-masked dropped",
    "two-updates teacher-entropy drawn-trust batch sequence-truncate kd-geometric group-mask stop-masked sequence-sum",
    "dp2 magnitude in-advantage cispo batch geometric-mask response-mask stop-masked dropped bonus",
    "dp2 two-updates sign prefix jsd dual-clip of-sequence batch group-mask sequence-sum bonus",
    "sp two-updates gate entropy dual-clip leave-one-out truncate kd-sequence group-mask stop-masked bonus",
    "sp signed-reference rising forward-top-k dual-clip undivided truncate stop-masked sequence-sum",
    "sp gate pass-rate jsd cispo of-sequence geometric-mask response-mask stop-masked",
    "gate teacher-entropy forward-top-k of-sequence batch response-mask dropped sequence-mean",
    "dp2 ratio dual-clip geometric-mask response-mask stop-masked dropped sequence-mean bonus",
    "two-updates in-reward cispo of-sequence batch truncate sequence-sum bonus",
    "pp2 two-updates modulate cispo sequence-truncate response-mask stop-masked",
    "cp2 two-updates entropy jsd cispo leave-one-out sequence-truncate response-mask sequence-sum",
    "pp2 relu entropy leave-one-out sequence-truncate kd-geometric stop-masked sequence-sum bonus",
    "pp2 gate trusted-prefix exact batch group-mask sequence-sum bonus",
    (
        "dp2 two-updates relu teacher-entropy of-sequence "
        "leave-one-out sequence-truncate response-mask stop-masked dropped sequence-mean"
    ),
    "two-updates sign rising drawn-trust cispo of-sequence leave-one-out truncate kd-geometric group-mask dropped sequence-sum",
    (
        "sp two-updates signed-reference magnitude forward-top-k of-sequence "
        "leave-one-out sequence-truncate group-mask dropped sequence-sum bonus"
    ),
    "cp2 two-updates signed-reference forward-top-k of-sequence leave-one-out geometric-mask response-mask sequence-mean bonus",
    "ratio dual-clip leave-one-out response-mask stop-masked sequence-sum",
    "sp in-reward of-sequence leave-one-out sequence-sum bonus",
    "sp modulate undivided geometric-mask group-mask dropped sequence-mean",
    "sp trusted-prefix in-advantage of-sequence leave-one-out sequence-truncate dropped sequence-sum",
    "sp centred in-advantage leave-one-out dropped sequence-mean bonus",
    "pp2 sign jsd dual-clip of-sequence sequence-truncate group-mask stop-masked",
    "pp2 two-updates pass-rate in-advantage cispo undivided stop-masked sequence-sum",
    "pp2 two-updates relu dual-clip of-sequence leave-one-out kd-sequence response-mask stop-masked sequence-sum bonus",
    (
        "two-updates relu prefix dual-clip of-sequence leave-one-out "
        "truncate kd-sequence response-mask stop-masked sequence-sum bonus"
    ),
    "cp2 two-updates gate magnitude exact undivided group-mask stop-masked dropped bonus",
    "entropy forward-top-k cispo leave-one-out dropped sequence-mean",
    "sp two-updates entropy drawn-trust in-advantage cispo geometric-mask response-mask sequence-mean",
    "teacher-entropy in-advantage of-sequence undivided geometric-mask group-mask stop-masked dropped sequence-mean bonus",
    "cp2 signed-reference trusted-prefix forward-top-k cispo of-sequence truncate response-mask stop-masked dropped bonus",
    "pp2 two-updates ratio dual-clip geometric-mask group-mask dropped sequence-sum bonus",
    "dp2 gate teacher-entropy jsd cispo undivided sequence-truncate response-mask stop-masked dropped sequence-sum",
    "cp2 gate prefix exact dual-clip of-sequence truncate group-mask stop-masked bonus",
    "dp2 in-reward cispo leave-one-out sequence-truncate response-mask dropped sequence-mean bonus",
    "cp2 two-updates modulate of-sequence leave-one-out sequence-truncate stop-masked sequence-sum",
    (
        "dp2 two-updates signed-reference exact cispo undivided "
        "sequence-truncate group-mask stop-masked dropped sequence-sum bonus"
    ),
    "cp2 two-updates gate rising exact of-sequence sequence-truncate response-mask stop-masked dropped sequence-mean",
    "cp2 two-updates sign entropy dual-clip undivided response-mask dropped sequence-sum",
)


def values_of(case: str) -> dict[str, str]:
    """The value of each axis in a case."""
    return {axis: next(iter(values)) for axis, values in AXES.items()} | {AXIS_OF[name]: name for name in case.split()}


def settings_of(names: Iterator[str] | list[str], base: Settings) -> Settings:
    """`base`, changed to these values."""
    changes: Changes = {}
    for name in names:
        changes |= AXES[AXIS_OF[name]][name]
    return replace(base, **changes)


def pairs() -> Iterator[tuple[str, str]]:
    """Every pair of values of two axes."""
    for one, other in combinations(AXES, 2):
        yield from product(AXES[one], AXES[other])


def pairs_of(case: str) -> set[tuple[str, str]]:
    """The pairs that occur in a case."""
    return set(combinations(values_of(case).values(), 2))
