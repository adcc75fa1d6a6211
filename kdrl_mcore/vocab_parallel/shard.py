"""Which columns of the vocabulary a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, stop) of the padded vocabulary stand in this rank's weight; columns >= size do not exist for any softmax.

    Attributes:
        group: the ranks that share the vocabulary, in column order; None is a single rank.
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
