"""Rewards by name: what a reward is, and how one is registered.

A reward gives each response a score, between 0 and 1 unless it says otherwise. Most are a plain function of one response:

    @register_function("short")
    def short(rollout: Rollout) -> float:
        return float(len(rollout.response_token_ids) <= 100)

One that needs a process, a model or a connection is a class (`Reward`), which is built once and closed at the end.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import ConfigError, RewardError
from kdrl_mcore.reward.answers import reference_answer
from kdrl_mcore.types import Rollout

RewardFunction = Callable[[Rollout], float]


class Reward(ABC):
    """Scores responses. Starts what it needs (processes, connections) with the first response."""

    timeouts = 0
    """Responses that scored 0 so far because judging them took longer than `reward.timeout`."""
    crashes = 0
    """Responses that scored 0 so far because judging them ended its process."""

    @abstractmethod
    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The score of each response, in order.

        Raises:
            RewardError: the reward itself failed. A failure is never a score.
        """

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """Why no response could match this reference answer, as the end of an error's line; None where one can."""
        return None

    def close(self) -> None:  # noqa: B027
        """End what was started."""


class AnswerReward(Reward):
    """Compares the answer found in the response with the reference answer: 1 where they are equal, else 0."""

    @abstractmethod
    def answer(self, rollout: Rollout) -> str | None:
        """The answer that the response gives; None or nothing where it gives none."""

    @abstractmethod
    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (reference, answer) pair is equal, in order."""

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """See `Reward`."""
        return None if reference_answer(answer) else "it is empty"

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """See `Reward`. Each distinct pair is compared once."""
        references, answers = [reference_of(rollout) for rollout in rollouts], [self.answer(rollout) for rollout in rollouts]
        pairs = list(zip(references, answers, strict=True))
        distinct = [(reference, answer) for reference, answer in dict.fromkeys(pairs) if answer]
        verdicts: dict[tuple[str, str | None], bool] = dict(zip(distinct, self.equal(distinct), strict=True))
        return [float(verdicts.get(pair, False)) for pair in pairs]


def reference_of(rollout: Rollout) -> str:
    """The bare reference answer of the response's prompt.

    Raises:
        RewardError: it has none.
    """
    reference = reference_answer(rollout.answer)
    if not reference:
        raise RewardError(f"prompt {rollout.prompt_id} has no reference answer: give every row of the data an answer")
    return reference


_registered: dict[str, type[Reward] | RewardFunction] = {}


def register_function(kind: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register a function of one response under this kind."""

    def register(function: RewardFunction) -> RewardFunction:
        _registered[kind] = function
        return function

    return register


def register_class(kind: str) -> Callable[[type[Reward]], type[Reward]]:
    """Register a `Reward` under this kind; it is built with the `RewardConfig`."""

    def register(reward: type[Reward]) -> type[Reward]:
        _registered[kind] = reward
        return reward

    return register


def registered_kinds() -> list[str]:
    """The kinds registered so far."""
    return list(_registered)


def build_reward(kind: str, config: RewardConfig) -> Reward:
    """The reward of a registered kind, or of `MODULE:NAME`, a function or a `Reward` of any module that Python can import.

    Raises:
        ConfigError: there is no such reward.
    """
    found = _registered.get(kind) or _import(kind)
    return found(config) if isinstance(found, type) else _OfEachResponse(found)


def reward_class(kind: str) -> type[Reward] | None:
    """The class of a reward, built by `build_reward`; None where it is a plain function.

    Raises:
        ConfigError: there is no such reward.
    """
    found = _registered.get(kind) or _import(kind)
    return found if isinstance(found, type) else None


class _OfEachResponse(Reward):
    def __init__(self, function: RewardFunction) -> None:
        self._function = function

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [float(self._function(rollout)) for rollout in rollouts]


def _import(kind: str) -> type[Reward] | RewardFunction:
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reward {kind} cannot be loaded ({error}): name a registered kind, or MODULE:NAME") from error
    if not callable(found) or (isinstance(found, type) and not issubclass(found, Reward)):
        raise ConfigError(f"reward {kind} is neither a function of a rollout nor a subclass of Reward")
    return found
