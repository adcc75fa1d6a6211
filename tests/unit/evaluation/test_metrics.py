"""The evaluation's metrics equal those from brute force over all draws, ties and resamplings."""

from __future__ import annotations

import itertools
from fractions import Fraction
from statistics import fmean, stdev

import numpy as np
import pytest

from kdrl_mcore.evaluation import metrics
from kdrl_mcore.evaluation.evaluate import Result, summarize
from kdrl_mcore.types import FinishReason, Rollout


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_response(samples: int) -> None:
    rows = list(itertools.product([0.0, 1.0], repeat=samples))
    for k in range(1, samples + 1):
        expected = [fmean(max(draw) for draw in itertools.combinations(row, k)) for row in rows]
        np.testing.assert_allclose(metrics.pass_at(k, np.array(rows)), expected, rtol=0, atol=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its expectation over K responses, each correct with probability p, is the probability that k of them have a correct
    one."""
    samples, k, p = 5, 3, Fraction(3, 10)
    rows = list(itertools.product([0, 1], repeat=samples))
    estimates = metrics.pass_at(k, np.array(rows, dtype=float))
    chances = [p ** sum(row) * (1 - p) ** (samples - sum(row)) for row in rows]
    assert sum(float(chance) * value for chance, value in zip(chances, estimates, strict=True)) == pytest.approx(
        float(1 - (1 - p) ** k), abs=1e-12
    )


def test_majority_is_the_mean_over_every_way_to_break_a_tie() -> None:
    choices = [metrics.NO_ANSWER, metrics.CORRECT_CLASS, 1, 2]
    rows = list(itertools.product(choices, repeat=4))
    for row, score in zip(rows, metrics.majority(np.array(rows)), strict=True):
        votes = [each for each in row if each != metrics.NO_ANSWER]
        most = max(map(votes.count, votes), default=0)
        winners = sorted({each for each in votes if votes.count(each) == most})
        assert score == pytest.approx(fmean(winner == metrics.CORRECT_CLASS for winner in winners) if winners else 0.0)


def test_pass_is_reported_for_powers_of_two_and_the_number_of_samples() -> None:
    assert {n: metrics.ks_of_pass(n) for n in (1, 2, 3, 8, 12)} == {
        1: [],
        2: [2],
        3: [2, 3],
        8: [2, 4, 8],
        12: [2, 4, 8, 12],
    }


def test_the_standard_error_takes_prompts_as_the_independent_draws() -> None:
    first, second = np.array([0.0, 0.5, 1.0, 0.25]), np.array([1.0, 0.0, 0.0])
    assert metrics.standard_error([first]) == pytest.approx(stdev(first) / 2)
    both = (stdev(first) ** 2 / 4 + stdev(second) ** 2 / 3) ** 0.5 / 2
    assert metrics.standard_error([first, second]) == pytest.approx(both)
    assert metrics.standard_error([np.array([1.0])]) == 0.0


def test_the_interval_is_that_of_every_resampling_of_the_prompts() -> None:
    scores = np.array([0.0, 0.25, 0.5, 1.0, 1.0])
    every = sorted(fmean(draw) for draw in itertools.product(scores, repeat=len(scores)))
    low, high = metrics.interval([scores])
    exact_low, exact_high = np.quantile(every, [0.025, 0.975])
    assert low == pytest.approx(exact_low, abs=0.051) and high == pytest.approx(exact_high, abs=0.051)  # a step of the mean
    assert metrics.interval([np.ones(3)]) == (1.0, 1.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        difficulty = generator.beta(1, 1, size=60)
        scores = generator.binomial(4, difficulty) / 4
        low, high = metrics.interval([scores])
        held += low <= 0.5 <= high
    assert 180 <= held <= 199  # 190 expected, with a standard deviation of 3


def rollout(correct: bool, group: int, length: int, answer_class: float | None, finish: FinishReason = "stop") -> Rollout:
    ids = np.zeros(length, np.int64)
    extra = {} if answer_class is None else {"answer_class": answer_class}
    return Rollout(f"p{group}", group, ids, ids, np.zeros(length, np.float32), finish, 0, correct=correct, extra=extra)


def test_a_summary_has_each_benchmark_and_the_means_over_them() -> None:
    hard = [rollout(True, 0, 4, 0), rollout(False, 0, 6, 1), rollout(False, 1, 8, 1, "length"), rollout(False, 1, 6, 1)]
    easy = [rollout(True, 0, 2, None), rollout(True, 0, 2, None)]
    results = [
        Result("hard", 2, hard, [rollout(True, 0, 4, None), rollout(False, 1, 4, None)]),
        Result("easy", 1, easy, [rollout(True, 0, 2, None)]),
    ]
    summary = summarize(results)
    expected = {
        "eval/hard/avg@2": 0.25,
        "eval/hard/pass@2": 0.5,
        "eval/hard/maj@2": 0.25,  # a tie, and a prompt whose votes are all wrong
        "eval/hard/greedy": 0.5,
        "eval/hard/response_length": 6.0,
        "eval/hard/truncated": 0.25,
        "eval/hard/avg@2_stderr": 0.25,
        "eval/easy/avg@2": 1.0,
        "eval/accuracy": 0.625,
        "eval/greedy_accuracy": 0.75,
        "eval/pass@2": 0.75,
        "eval/response_length": 4.0,
        "eval/truncated": 0.125,
        "eval/accuracy_stderr": 0.125,
        "eval/greedy_accuracy_stderr": 0.25,
        "eval/greedy_accuracy_low": 0.5,
        "eval/greedy_accuracy_high": 1.0,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert "eval/easy/maj@2" not in summary and "eval/maj@2" not in summary  # easy's verifier compares no answers
    assert summary["eval/hard/avg@2_low"] == 0.0 and summary["eval/hard/avg@2_high"] == 0.5
