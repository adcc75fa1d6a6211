"""The base classes of rewards, and their registration by name.

A reward gives each response a score, between 0 and 1 unless documented otherwise. Most are a plain function of one response:

    @register_function("short")
    def short(rollout: Rollout) -> float:
        return float(len(rollout.response_token_ids) <= 100)

Further parameters are columns of the row, by name (`data.columns`):

    @register_function("at_least")
    def at_least(rollout: Rollout, minimum: int) -> float:
        return float(len(rollout.response) >= minimum)

A reward that needs a process, a model or a connection is a class (`Reward`), built once and closed at the end; it finds the
columns in `rollout.columns`.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import ConfigError, KdrlError, RewardError
from kdrl_mcore.reward.answers import reference_answer
from kdrl_mcore.reward.verdicts import Unjudged
from kdrl_mcore.types import Rollout

RewardFunction = Callable[..., float]
"""A function of a rollout and of columns, its further parameters."""


class Reward(ABC):
    """Scores responses. Processes and connections that it needs start with the first response."""

    timeouts = 0
    """The number of responses so far that scored 0 because judging them took longer than `reward.timeout`."""
    crashes = 0
    """The number of responses so far that scored 0 because judging them ended the process."""
    undecided: Set[tuple[str, str]] = frozenset()
    """For rewards that compare answers, the (reference, answer) pairs of the last comparison that count as unequal for one of
    these reasons."""

    @abstractmethod
    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The score of each response, in order. A response that could not be judged has an `Unjudged` score, which is 0.

        Raises:
            RewardError: the reward itself failed, which never counts as a score.
        """

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """Why no response can match this reference answer, as the end of an error message; None if one can."""
        return None

    def close(self) -> None:  # noqa: B027
        """End the processes and connections."""


class AnswerReward(Reward):
    """Compares the answer found in the response with the reference answer: 1 if they are equal, else 0."""

    @abstractmethod
    def answer(self, rollout: Rollout) -> str | None:
        """The answer in the response; None or empty if it has none."""

    @classmethod
    def statements(cls, answer: str) -> tuple[str, ...]:
        """Responses at least one of which must be correct if `answer` is the reference; empty if none are known."""
        return ()

    @abstractmethod
    def equal(self, pairs: Sequence[tuple[str, str]]) -> Sequence[bool | Unjudged]:
        """Whether each (reference, answer) pair is equal, in order; `Unjudged` if that could not be determined."""

    def spelling(self, answer: str) -> str:
        """The answer in a canonical spelling: answers with the same spelling are equal and need no comparison."""
        return answer

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """See `Reward`."""
        return None if reference_answer(answer) else "it is empty"

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """See `Reward`. Each distinct pair is compared once."""
        references, answers = [reference_of(rollout) for rollout in rollouts], [self.answer(rollout) for rollout in rollouts]
        pairs = list(zip(references, answers, strict=True))
        distinct = [(reference, answer) for reference, answer in dict.fromkeys(pairs) if answer]
        verdicts: dict[tuple[str, str | None], bool | Unjudged] = dict(zip(distinct, self.equal(distinct), strict=True))
        found = [verdicts.get(pair, False) for pair in pairs]
        return [verdict if isinstance(verdict, Unjudged) else float(verdict) for verdict in found]


def reference_of(rollout: Rollout) -> str:
    """The bare reference answer of the response's prompt.

    Raises:
        RewardError: the prompt has none.
    """
    reference = reference_answer(rollout.answer)
    if not reference:
        raise RewardError(f"prompt {rollout.prompt_id} has no reference answer: give every row of the data an answer")
    return reference


_registered: dict[str, type[Reward] | RewardFunction] = {}


def register_function(kind: str) -> Callable[[RewardFunction], RewardFunction]:
    """A decorator that registers a function of one response under this kind."""

    def register(function: RewardFunction) -> RewardFunction:
        _registered[kind] = function
        return function

    return register


def register_class(kind: str) -> Callable[[type[Reward]], type[Reward]]:
    """A decorator that registers a `Reward` under this kind; it is built with the `RewardConfig`."""

    def register(reward: type[Reward]) -> type[Reward]:
        _registered[kind] = reward
        return reward

    return register


def registered_kinds() -> list[str]:
    """The kinds registered so far."""
    return list(_registered)


def build_reward(kind: str, config: RewardConfig) -> Reward:
    """The reward of a registered kind, or of `MODULE:NAME`: a function or a `Reward` in any module that Python can import.

    Raises:
        ConfigError: there is no such reward.
        RewardError: a reward of the user's own cannot be built.
    """
    found = _registered.get(kind) or _import(kind)
    with failures_of(kind):
        return found(config) if isinstance(found, type) else _OfEachResponse(found)


@contextmanager
def failures_of(kind: str) -> Iterator[None]:
    """Turn whatever the code of a user's own reward (MODULE:NAME) raises into a RewardError that names the line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, KdrlError) or ":" not in kind:
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(f"reward {kind} failed at {at.filename}:{at.lineno}: {type(error).__name__}: {error}") from error


def reward_class(kind: str) -> type[Reward] | None:
    """The class of a reward, which `build_reward` builds; None if it is a plain function.

    Raises:
        ConfigError: there is no such reward.
    """
    found = _registered.get(kind) or _import(kind)
    return found if isinstance(found, type) else None


def needed_columns(kind: str) -> list[str]:
    """The columns that are parameters of a reward function without a default; a dot in a column's key becomes an underscore.

    Raises:
        ConfigError: there is no such reward.
    """
    found = _registered.get(kind) or _import(kind)
    columns = [] if isinstance(found, type) else _columns(found)
    return [name for name, parameter in columns if parameter.default is parameter.empty]


def _columns(function: RewardFunction) -> list[tuple[str, inspect.Parameter]]:
    """The parameters after the rollout that can be passed by name."""
    try:
        parameters = list(inspect.signature(function).parameters.items())[1:]
    except ValueError:  # a function not written in Python
        return []
    return [(name, each) for name, each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


class _OfEachResponse(Reward):
    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._columns = _columns(function)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [float(self._function(rollout, **self._chosen(rollout))) for rollout in rollouts]

    def _chosen(self, rollout: Rollout) -> dict[str, Any]:
        held = {key.replace(".", "_"): value for key, value in rollout.columns.items()}
        for name, parameter in self._columns:
            if name not in held and parameter.default is parameter.empty:
                raise RewardError(f"prompt {rollout.prompt_id} has no column '{name}', which a reward needs: see data.columns")
        return {name: held[name] for name, _ in self._columns if name in held}


def _import(kind: str) -> type[Reward] | RewardFunction:
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reward {kind} cannot be loaded ({error}): name a registered kind, or MODULE:NAME") from error
    if not callable(found) or (isinstance(found, type) and not issubclass(found, Reward)):
        raise ConfigError(f"reward {kind} is neither a function of a rollout nor a subclass of Reward")
    return found
