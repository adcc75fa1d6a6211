"""Ranges of numeric keys. None of them contains NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdrl_mcore.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, without open ends, and the numbers in `also`."""

    low: float = -math.inf
    high: float = math.inf
    low_is_open: bool = False
    high_is_open: bool = False
    also: tuple[int, ...] = ()

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        above = value > self.low if self.low_is_open else value >= self.low
        below = value < self.high if self.high_is_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        """The range in words, for errors: `greater than 0 and at most 1`."""
        low = [] if self.low == -math.inf else [f"{'greater than' if self.low_is_open else 'at least'} {_number(self.low)}"]
        high = [] if self.high == math.inf else [f"{'less than' if self.high_is_open else 'at most'} {_number(self.high)}"]
        return " or ".join([*map(str, self.also), " and ".join([*low, *high])])

    @property
    def interval(self) -> str:
        """The range as an interval: `(0, 1]`."""
        low, high = ("1e9" if value == INTEGERS else f"{value:.10g}" for value in (self.low, self.high))
        ends = f"{'(' if self.low_is_open else '['}{low}, {high}{')' if self.high_is_open else ']'}"
        return " or ".join([*map(str, self.also), ends])


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.12g}"


INTEGERS = 10**9
"""Above every realistic count, and still readable in an error."""
LARGE = 1e6
"""The limit of coefficients, rewards and rates: a thousand times any value in use, and far below float32's largest number."""
YEAR = 366 * 86400.0
"""A year in seconds; the timers of Python's locks and of torch.distributed overflow after about a century."""

COUNT = Range(1, INTEGERS)
COUNT_OR_OFF = Range(0, INTEGERS)
EVERY = Range(-1, INTEGERS)
DEGREE = Range(1, 2**20)
SECONDS = Range(0, YEAR, low_is_open=True)
NOT_NEGATIVE = Range(0, LARGE)
POSITIVE = Range(0, LARGE, low_is_open=True)
SIGNED = Range(-LARGE, LARGE)
SHARE = Range(0, 1, low_is_open=True)
DECAY = Range(0, 1, high_is_open=True)
RATE = Range(0, 1e9)
SEED = Range(0, 2**32 - 1)  # accepted by numpy, torch and vLLM alike
TEMPERATURE = Range(1e-3, 1e3)


def check_number(name: str, value: float, bounds: Range) -> None:
    """Raise ConfigError, which names the key or option, if the value is not in its range."""
    if value not in bounds:
        raise ConfigError(
            f"{name}={value:g} must be {bounds}" if isinstance(value, float) else f"{name}={value} must be {bounds}"
        )


def numbers(node: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Each number in nested mappings and lists, with its name, such as `reward.terms[0].weight`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from numbers(value, f"{name}[{index}]")
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield name, node
