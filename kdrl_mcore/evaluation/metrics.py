"""The metrics of an evaluation, as pure functions of which responses are correct. P prompts, K responses to each.

Each score is computed per prompt; a benchmark's number is the mean over its prompts, and the overall number the mean over
benchmarks, as in papers. Prompts are the independent draws: the K responses to one prompt share its difficulty, so the
standard error is that of the prompts' means (clustered by prompt, https://arxiv.org/abs/2411.00640), and intervals resample
prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

NO_ANSWER, CORRECT_CLASS = -1, 0
"""The values in `class_PK` of a response without an answer, and of a correct one; equal wrong answers share another number."""
LEVEL = 0.95
BOOTSTRAP_SAMPLES = 2000


def average(correct_PK: Scores) -> Scores:
    """avg@K: the share of correct responses [P]."""
    return correct_PK.mean(axis=1)


def pass_at(k: int, correct_PK: Scores) -> Scores:
    """pass@k: the probability [P] that k of the K responses, drawn without replacement, contain a correct one:
    1 - C(K-c, k) / C(K, k) for c correct responses (the unbiased estimator of https://arxiv.org/abs/2107.03374)."""
    total = correct_PK.shape[1]
    counts = correct_PK.sum(axis=1).astype(int).tolist()
    return np.array([1 - comb(total - correct, k) / comb(total, k) for correct in counts])


def majority(class_PK: NDArray[np.int64]) -> Scores:
    """maj@K: whether the most frequent answer is correct [P].

    Responses without an answer have no vote; a prompt without any vote scores 0. If m answers tie for the most votes, one of
    them counts as drawn at random: the score is the expectation, 1/m if the correct answer is among them and 0 otherwise.
    """
    scores = []
    for classes in class_PK.tolist():
        votes = Counter(each for each in classes if each != NO_ANSWER)
        most = max(votes.values(), default=0)
        first = [each for each, count in votes.items() if count == most]
        scores.append(float(CORRECT_CLASS in first) / len(first) if first else 0.0)
    return np.array(scores)


def ks_of_pass(samples: int) -> list[int]:
    """The values of k for which pass@k is reported: 2, 4, 8, ..., and the number of samples itself (pass@1 is avg@K)."""
    powers = [1 << power for power in range(1, samples.bit_length()) if 1 << power < samples]
    return [*powers, samples] if samples > 1 else []


def standard_error(benchmarks: Sequence[Scores]) -> float:
    """The standard error of the mean over benchmarks of each benchmark's mean over prompts. A benchmark with a single prompt
    contributes 0."""
    variances = [scores.var(ddof=1) / len(scores) if len(scores) > 1 else 0.0 for scores in benchmarks]
    return float(np.sqrt(sum(variances)) / len(benchmarks))


def interval(benchmarks: Sequence[Scores]) -> tuple[float, float]:
    """The 95 % interval of the same mean: percentile bootstrap over the prompts of each benchmark, with fixed draws.

    It has width zero where all prompts score alike (all solved, or none), which does not mean that other prompts would too.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(BOOTSTRAP_SAMPLES)
    for scores in benchmarks:
        drawn = generator.integers(len(scores), size=(BOOTSTRAP_SAMPLES, len(scores)))
        means += scores[drawn].mean(axis=1) / len(benchmarks)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
