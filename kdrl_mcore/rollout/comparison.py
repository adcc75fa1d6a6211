"""Compare two scored files token by token: trainer against sampler, or one layout against another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdrl_mcore.errors import DataError
from kdrl_mcore.types import Rollout, TokenFloats

Scored = Sequence[tuple[Rollout, dict[str, TokenFloats]]]
"""The result of `read_scored`."""


@dataclass(frozen=True)
class TokenDifference:
    """A token on which the files differ: its response (the line, from 1), its index in the response, both values, and the
    absolute difference, which is infinite if only one of the two is a number."""

    line: int
    prompt_id: str
    index: int
    token_id: int
    left: float
    right: float
    size: float


@dataclass(frozen=True)
class ScoreComparison:
    """The differences in one kind of score, over the responses that have it in both files: their number, the number of their
    tokens, the largest and the mean difference, and the worst tokens."""

    name: str
    num_responses: int
    num_tokens: int
    largest: float
    mean: float
    worst: tuple[TokenDifference, ...]


def compare_scores(left: Scored, right: Scored, num_worst: int = 5) -> list[ScoreComparison]:
    """Compare every kind of score that some response has in both files.

    A file that a training run wrote has no `log_probs`; its `sampler_log_probs` are compared with the `log_probs` of a scored
    file, or with the `sampler_log_probs` of another such file. A run's rollouts have `teacher_log_probs` only where they were
    distilled.

    Raises:
        DataError: the files hold different responses, or have no score in common.
    """
    if len(left) != len(right):
        raise DataError(f"the files hold {len(left)} and {len(right)} responses: compare scores of the same rollout file")
    for line, ((mine, _), (other, _)) in enumerate(zip(left, right, strict=True), start=1):
        for part in ("prompt_token_ids", "response_token_ids"):
            if not np.array_equal(getattr(mine, part), getattr(other, part)):
                raise DataError(f"line {line} has different {part} in the two files: compare scores of the same rollout file")
    have = [set[str]().union(*(scores for _, scores in side)) for side in (left, right)]
    policy = ["log_probs" if "log_probs" in names else "sampler_log_probs" for names in have]
    pairs = {(name, name): None for name in sorted(have[0] & have[1] - {"sampler_log_probs"})} | {tuple(policy): None}
    compared = [_compare(left, right, names, num_worst) for names in pairs]
    found = [each for each in compared if each is not None]
    if not found:
        raise DataError(
            f"the files have no score in common (one has {_names(have[0])}, the other {_names(have[1])}): score both with "
            "kdrl-score"
        )
    return found


def _compare(left: Scored, right: Scored, names: tuple[str, ...], num_worst: int) -> ScoreComparison | None:
    """One kind of score, over the responses that have it in both files; None if there are none."""
    pairs = enumerate(zip(left, right, strict=True))
    both = [line for line, ((_, mine), (_, other)) in pairs if names[0] in mine and names[1] in other]
    if not both:
        return None
    lines = np.repeat(both, [len(left[line][0].response_token_ids) for line in both])
    mine = np.concatenate([left[line][1][names[0]] for line in both]).astype(np.float64)
    other = np.concatenate([right[line][1][names[1]] for line in both]).astype(np.float64)
    same = (mine == other) | (np.isnan(mine) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        sizes = np.where(same, 0.0, np.nan_to_num(np.abs(mine - other), nan=np.inf, posinf=np.inf))
    first = np.searchsorted(lines, lines)  # each token's response begins here
    worst = []
    for token in np.argsort(-sizes, kind="stable")[:num_worst].tolist():
        line, index = int(lines[token]), int(token - first[token])
        rollout = left[line][0]
        token_id = int(rollout.response_token_ids[index])
        values = float(mine[token]), float(other[token]), float(sizes[token])
        worst.append(TokenDifference(line + 1, rollout.prompt_id, index, token_id, *values))
    label = names[0] if names[0] == names[1] else f"{names[0]} - {names[1]}"
    return ScoreComparison(label, len(both), len(sizes), float(sizes.max()), float(sizes.mean()), tuple(worst))


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
