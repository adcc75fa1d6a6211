"""The endless stream of prompts from which training draws its batches."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.errors import DataError
from kdrl_mcore.types import Prompt

Position = tuple[str, int]
"""The position of a prompt: the name of its domain, and its number among the prompts drawn from the domain, which counts from 0
on through all epochs."""


@dataclass(frozen=True)
class Domain:
    """One of the data sets of a run: its name, its prompts, its weight in the mixture, and the kind of its verifier."""

    name: str
    prompts: Sequence[Prompt]
    weight: float = 1.0
    reward: str = ""


class PromptStream:
    """Batches of prompts, epoch after epoch, from one data set or from several domains.

    A domain's order in an epoch is a function only of (seed, epoch, its name). Every epoch contains each of its prompts once,
    and a batch that reaches the end of an epoch continues with the next one. Domains take turns by their weights: for each
    prompt, every domain's credit grows by its share, and the domain with the most credit provides the prompt and pays 1. So
    the number of prompts from a domain is its share of all to within one, in each batch and over the run. The whole state of
    the stream is the number of prompts drawn from each domain, and the credits.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """The stream of one data set. Without `shuffle`, every epoch keeps the data set's order."""
        self._start([Domain("", prompts)], batch_size, seed, shuffle)

    @classmethod
    def of(cls, domains: Sequence[Domain], batch_size: int, seed: int, shuffle: bool) -> PromptStream:
        """The stream of several domains."""
        stream = cls.__new__(cls)
        stream._start(domains, batch_size, seed, shuffle)
        return stream

    def _start(self, domains: Sequence[Domain], batch_size: int, seed: int, shuffle: bool) -> None:
        assert domains and batch_size > 0 and all(len(domain.prompts) for domain in domains)
        self._batch_size = batch_size
        self._domains = [_DomainOrder(domain, len(domains) == 1, seed, shuffle) for domain in domains]
        total = sum(domain.weight for domain in domains)
        self._shares = [domain.weight / total for domain in domains]
        self._credits = [0.0] * len(domains)

    @property
    def batch_size(self) -> int:
        """The prompts of a batch."""
        return self._batch_size

    @property
    def given(self) -> int:
        """The number of prompts drawn."""
        return sum(order.given for order in self._domains)

    def next_batch(self, count: int | None = None) -> list[Prompt]:
        """The next `batch_size` prompts, or the next `count`."""
        return [prompt for _, prompt in self.draw(self._batch_size if count is None else count)]

    def draw(self, count: int) -> list[tuple[Position, Prompt]]:
        """The next `count` prompts, each with its position."""
        drawn = []
        for _ in range(count):
            order = self._next_domain()
            drawn.append(((order.domain.name, order.given), order.prompt(order.given)))
            order.given += 1
        return drawn

    def at(self, position: Position) -> Prompt:
        """The prompt at this position; the stream does not advance.

        Raises:
            DataError: there is no such domain.
        """
        name, number = position
        for order in self._domains:
            if order.domain.name == name:
                return order.prompt(number)
        raise DataError(f"the run trains on {_listed([order.domain.name for order in self._domains])}, not on {name}")

    def _next_domain(self) -> _DomainOrder:
        if len(self._domains) == 1:
            return self._domains[0]
        self._credits = [credit + share for credit, share in zip(self._credits, self._shares, strict=True)]
        index = self._credits.index(max(self._credits))
        self._credits[index] -= 1
        return self._domains[index]

    def first(self, count: int) -> list[Prompt]:
        """The first prompts of the first data set, at most `count`; the stream does not advance."""
        return list(self._domains[0].domain.prompts[:count])

    def state_dict(self) -> dict[str, Any]:
        """The cursor: the number of prompts drawn and the size of the data; with several domains also both for each domain, and
        its credit."""
        state: dict[str, Any] = {
            "given": self.given,
            "num_prompts": sum(len(order.domain.prompts) for order in self._domains),
        }
        if len(self._domains) > 1:
            state["domains"] = {
                order.domain.name: {"given": order.given, "num_prompts": len(order.domain.prompts), "credit": credit}
                for order, credit in zip(self._domains, self._credits, strict=True)
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where the stream with this `state` stopped. The weights may have changed: the new ones apply from here on.

        Raises:
            DataError: the state belongs to other data sets, or to one of another size.
        """
        advice = "resume with the same data, or start over with checkpoint.resume=never"
        alone = len(self._domains) == 1
        saved = state.get("domains", {} if not alone else {self._domains[0].domain.name: state})
        names = [order.domain.name for order in self._domains]
        if sorted(saved) != sorted(names):
            raise DataError(
                f"the run trains on {_listed(names)}, the checkpoint was made with {_listed(list(saved))}: {advice}"
            )
        for index, order in enumerate(self._domains):
            own, size = saved[order.domain.name], len(order.domain.prompts)
            if own["num_prompts"] != size:
                of = f" (of {order.domain.name})" if not alone else ""
                made = f"{own['num_prompts']}{of}"
                raise DataError(f"data.train has {size} prompts, the checkpoint was made with {made}: {advice}")
            order.given = own["given"]
            self._credits[index] = own.get("credit", 0.0)


class _DomainOrder:
    """One domain, the number of prompts drawn from it, and the order of the latest epoch."""

    def __init__(self, domain: Domain, alone: bool, seed: int, shuffle: bool) -> None:
        self.domain, self.given = domain, 0
        self._key = [seed] if alone else [seed, zlib.crc32(domain.name.encode())]
        self._shuffle = shuffle
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def prompt(self, number: int) -> Prompt:
        epoch, index = divmod(number, len(self.domain.prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return self.domain.prompts[int(self._order[index])]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        size = len(self.domain.prompts)
        if not self._shuffle:
            return np.arange(size)
        seed, *name = self._key
        return np.random.default_rng([seed, epoch, *name]).permutation(size)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if any(names) else "one data set"
