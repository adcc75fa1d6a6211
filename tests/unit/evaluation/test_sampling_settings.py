"""Evaluations have separate sampling settings; those that are not set are training's."""

from __future__ import annotations

import pytest

from kdrl_mcore.config import EvalConfig, RolloutConfig, load_config
from kdrl_mcore.config.derived import max_engine_tokens
from kdrl_mcore.evaluation.evaluate import GREEDY, SAMPLED, sampling_of


@pytest.mark.parametrize(
    ("settings", "expected", "stop"),
    [
        (EvalConfig(), (1.0, 0.9, 20, 0.1), ("END",)),
        (EvalConfig(temperature=0.6, top_p=0.95, top_k=0, min_p=0.0, stop=[], max_response_tokens=99), (0.6, 0.95, 0, 0.0), ()),
    ],
)
def test_how_evaluations_sample(settings: EvalConfig, expected: tuple[float, float, int, float], stop: tuple[str, ...]) -> None:
    rollout = RolloutConfig(temperature=0.8, top_p=0.9, top_k=20, min_p=0.1, stop=["END"], max_response_tokens=50)
    sampling = sampling_of(SAMPLED, 0, settings, rollout, 1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == expected
    greedy = sampling_of(GREEDY, 0, settings, rollout, 1)
    assert sampling.stop == greedy.stop == stop
    assert sampling.max_response_tokens == greedy.max_response_tokens == (settings.max_response_tokens or 50)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0.0, 1.0, 0, 0.0)


def test_engines_take_the_longest_responses_of_training_and_evaluation() -> None:
    words = ["objective=grpo", "rollout.max_prompt_tokens=100", "rollout.max_response_tokens=50", "eval.max_response_tokens=70"]
    assert max_engine_tokens(load_config(words)) == 150
    assert max_engine_tokens(load_config([*words, "data.eval=e.jsonl"])) == 170
    assert max_engine_tokens(load_config([*words[:3], "data.eval=e.jsonl"])) == 150
