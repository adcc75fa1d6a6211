"""How far two scored files differ, token by token: trainer against sampler, or one layout against another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdrl_mcore.errors import DataError
from kdrl_mcore.types import Rollout, TokenFloats

Scored = Sequence[tuple[Rollout, dict[str, TokenFloats]]]
"""What `read_scored` gives."""


@dataclass(frozen=True)
class TokenDifference:
    """One token on which the files differ: its response (line, from 1), its place in it, both values, and the absolute
    difference; infinite where only one of the two is a number."""

    line: int
    prompt_id: str
    place: int
    token_id: int
    left: float
    right: float
    size: float


@dataclass(frozen=True)
class Comparison:
    """The differences in one kind of score: over how many tokens, the largest and the mean, and the worst tokens."""

    name: str
    num_tokens: int
    largest: float
    mean: float
    worst: tuple[TokenDifference, ...]


def compare_scores(left: Scored, right: Scored, num_worst: int = 5) -> list[Comparison]:
    """Compare every kind of score that both files have.

    Where the right file is a plain rollout file, the left one's `log_probs` are compared with its `sampler_log_probs`.

    Raises:
        DataError: the files hold different responses, or have no score in common.
    """
    if len(left) != len(right):
        raise DataError(f"the files hold {len(left)} and {len(right)} responses: compare scores of one rollout file")
    for line, ((mine, _), (other, _)) in enumerate(zip(left, right, strict=True), start=1):
        for part in ("prompt_token_ids", "response_token_ids"):
            if not np.array_equal(getattr(mine, part), getattr(other, part)):
                raise DataError(f"line {line} has different {part} in the two files: compare scores of one rollout file")
    have = [set.intersection(*(set(scores) for _, scores in side)) - {"sampler_log_probs"} for side in (left, right)]
    pairs = [(name, name) for name in sorted(have[0] & have[1])]
    if not have[1] and "log_probs" in have[0]:
        pairs = [("log_probs", "sampler_log_probs")]
    if not pairs:
        raise DataError(
            f"the files have no score in common (one has {_names(have[0])}, the other {_names(have[1])}): score both with "
            "tools/score.py"
        )
    return [_compare(left, right, names, num_worst) for names in pairs]


def _compare(left: Scored, right: Scored, names: tuple[str, str], num_worst: int) -> Comparison:
    lines = np.repeat(np.arange(len(left)), [len(rollout.response_token_ids) for rollout, _ in left])
    mine = np.concatenate([scores[names[0]] for _, scores in left]).astype(np.float64)
    other = np.concatenate([scores[names[1]] for _, scores in right]).astype(np.float64)
    same = (mine == other) | (np.isnan(mine) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        sizes = np.where(same, 0.0, np.nan_to_num(np.abs(mine - other), nan=np.inf, posinf=np.inf))
    first = np.searchsorted(lines, lines)  # each token's response begins here
    worst = []
    for token in np.argsort(-sizes, kind="stable")[:num_worst].tolist():
        line, place = int(lines[token]), int(token - first[token])
        rollout = left[line][0]
        token_id = int(rollout.response_token_ids[place])
        values = float(mine[token]), float(other[token]), float(sizes[token])
        worst.append(TokenDifference(line + 1, rollout.prompt_id, place, token_id, *values))
    label = names[0] if names[0] == names[1] else f"{names[0]} - {names[1]}"
    return Comparison(label, len(sizes), float(sizes.max()), float(sizes.mean()), tuple(worst))


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
