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
    """One token on which the files differ: its response (line, from 1), its place in it, and both values."""

    line: int
    prompt_id: str
    place: int
    token_id: int
    left: float
    right: float

    @property
    def size(self) -> float:
        """The absolute difference; infinite where only one of the two is a number."""
        if np.isnan(self.left) or np.isnan(self.right):
            return 0.0 if np.isnan(self.left) and np.isnan(self.right) else float("inf")
        return abs(self.left - self.right)


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
    differences = [
        TokenDifference(line, rollout.prompt_id, place, int(token), float(a), float(b))
        for line, ((rollout, mine), (_, other)) in enumerate(zip(left, right, strict=True), start=1)
        for place, (token, a, b) in enumerate(zip(rollout.response_token_ids, mine[names[0]], other[names[1]], strict=True))
    ]
    sizes = [difference.size for difference in differences]
    worst = sorted(differences, key=lambda difference: -difference.size)[:num_worst]
    label = names[0] if names[0] == names[1] else f"{names[0]} - {names[1]}"
    return Comparison(label, len(sizes), max(sizes), float(np.mean(sizes)), tuple(worst))


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
