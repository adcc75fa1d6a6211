"""Evaluations have separate sampling settings; those that are not set are training's."""

from __future__ import annotations

import pytest

from kdrl_mcore.config import EvalConfig, RolloutConfig
from kdrl_mcore.evaluation.evaluate import GREEDY, SAMPLED, sampling_of


@pytest.mark.parametrize(
    ("settings", "expected", "stop"),
    [
        (EvalConfig(), (1.0, 0.9, 20, 0.1), ("END",)),
        (EvalConfig(temperature=0.6, top_p=0.95, top_k=0, min_p=0.0, stop=[]), (0.6, 0.95, 0, 0.0), ()),
    ],
)
def test_how_evaluations_sample(settings: EvalConfig, expected: tuple[float, float, int, float], stop: tuple[str, ...]) -> None:
    rollout = RolloutConfig(temperature=0.8, top_p=0.9, top_k=20, min_p=0.1, stop=["END"])
    sampling = sampling_of(SAMPLED, 0, settings, rollout, 1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == expected
    greedy = sampling_of(GREEDY, 0, settings, rollout, 1)
    assert sampling.stop == greedy.stop == stop
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0.0, 1.0, 0, 0.0)
