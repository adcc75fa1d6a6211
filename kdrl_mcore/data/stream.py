"""The endless stream of prompts that training draws its batches from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.errors import DataError
from kdrl_mcore.types import Prompt


class PromptStream:
    """Batches of prompts, epoch after epoch.

    An epoch's order is a function of (seed, epoch) alone, so the stream's whole state is how many prompts it has given. Every
    epoch gives each prompt once; a batch that reaches the end of an epoch goes on with the next one.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """Without `shuffle`, every epoch has the data set's own order."""
        assert prompts and batch_size > 0
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._given = 0
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def next_batch(self) -> list[Prompt]:
        """The next `batch_size` prompts."""
        batch = [self._at(place) for place in range(self._given, self._given + self._batch_size)]
        self._given += self._batch_size
        return batch

    def first(self, count: int) -> list[Prompt]:
        """The first prompts of the data set, at most `count`; the stream itself does not move."""
        return list(self._prompts[:count])

    def state_dict(self) -> dict[str, int]:
        """The cursor: how many prompts were given, and of how large a data set."""
        return {"given": self._given, "num_prompts": len(self._prompts)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the stream that gave `state` stopped.

        Raises:
            DataError: the state belongs to a data set of another size.
        """
        if state["num_prompts"] != len(self._prompts):
            raise DataError(
                f"data.train has {len(self._prompts)} prompts, the checkpoint was made with {state['num_prompts']}: "
                "resume with the same data, or start anew with checkpoint.resume=never"
            )
        self._given = state["given"]

    def _at(self, place: int) -> Prompt:
        epoch, index = divmod(place, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return self._prompts[self._order[index]]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
