"""Rewards that tests name by their import path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl_mcore.reward.registry import AnswerReward
from kdrl_mcore.types import Rollout


class LengthModulo(AnswerReward):
    """The answer of a random model's response is its length modulo 3."""

    def __init__(self, config: Any) -> None:
        pass

    def answer(self, rollout: Rollout) -> str:
        return str(len(rollout.response_token_ids) % 3)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [left == right for left, right in pairs]


def needs_column(rollout: Rollout, info_level: float) -> float:
    return float(info_level or 0.0)


def fails_in_step_2(rollout: Rollout) -> float:
    return 1.0 if rollout.weight_version == 0 else {}["no such key"]


class WithoutAScore(AnswerReward):
    """A reward that cannot be built."""
