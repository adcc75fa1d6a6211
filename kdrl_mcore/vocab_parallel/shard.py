"""Which columns of the vocabulary a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's weight holds the columns [start, stop) of the padded vocabulary; columns >= size take part in no softmax.

    Attributes:
        group: the ranks that share the vocabulary, in column order; None for a single rank.
        size: the number of real tokens. A rank may hold none of them.
    """

    group: dist.ProcessGroup | None
    start: int
    stop: int
    size: int

    @property
    def ranks(self) -> int:
        """How many ranks share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    @property
    def real_columns(self) -> int:
        """How many of this rank's columns are real tokens; the padding comes last."""
        return max(0, min(self.size, self.stop) - self.start)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For global token ids of any shape: whether this rank holds each, and its local column (0 where it does not)."""
        columns = ids - self.start
        own = (columns >= 0) & (columns < self.real_columns)
        return own, torch.where(own, columns, 0)

    def check_targets(self, targets_T: Tensor) -> None:
        """Raise ValueError if a target is not a real token.

        On CUDA this would cost a synchronisation, so it is skipped there: the log-prob of such a target is NaN, which every
        check of the loss detects.
        """
        if targets_T.device.type == "cpu" and len(targets_T):
            low, high = torch.aminmax(targets_T)
            if low < 0 or high >= self.size:
                raise ValueError(
                    f"target token ids reach from {int(low)} to {int(high)}, but the vocabulary has the ids 0 to "
                    f"{self.size - 1}: check that the tokens come from this model's tokenizer"
                )
