"""The teacher's scores of a rollout batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdrl_mcore.teacher.hidden_states import States
from kdrl_mcore.types import TokenFloats


@dataclass
class TeacherScores:
    """The teacher's scores of a rollout batch so far, by each response's index in the batch.

    Attributes:
        scored: the number of tokens scored of each response.
        dropped_tokens: the number of tokens scored of responses that were dropped from the batch afterwards.
        log_probs, entropies: log T of the sampled tokens and the entropies of T [response tokens], 0 for tokens that were not
            scored.
        hidden: the last hidden states, for a divergence over the vocabulary; log-probs and entropies then exist only
            if token weights need them.
    """

    scored: dict[int, int] = field(default_factory=dict)
    dropped_tokens: int = 0
    log_probs: dict[int, TokenFloats] = field(default_factory=dict)
    entropies: dict[int, TokenFloats] = field(default_factory=dict)
    hidden: States | None = None

    @property
    def tokens(self) -> int:
        """The number of response tokens scored."""
        return sum(self.scored.values())

    def add(self, scores: TeacherScores, lengths: Mapping[int, int]) -> None:
        """Add scores of further responses.

        Args:
            lengths: the number of tokens of each response, which may be more than were scored.
        """
        for mine, new in ((self.log_probs, scores.log_probs), (self.entropies, scores.entropies)):
            mine.update({index: np.pad(values, (0, lengths[index] - len(values))) for index, values in new.items()})
        if scores.hidden is not None:
            self.hidden = scores.hidden.joined(self.hidden)  # type: ignore[arg-type]  # both are of one kind
        self.scored |= scores.scored

    def skip(self, index: int, length: int) -> None:
        """Record a response of which the teacher can score no token."""
        self.scored[index] = 0
        self.log_probs[index] = self.entropies[index] = np.zeros(length, np.float32)

    def keep(self, indices: Sequence[int]) -> None:
        """Drop the scores of all responses but these; the scores of response `indices[i]` become those of response i."""
        log_probs, entropies, hidden = self.log_probs, self.entropies, self.hidden
        self.log_probs = {new: log_probs[index] for new, index in enumerate(indices) if index in log_probs}
        self.entropies = {new: entropies[index] for new, index in enumerate(indices) if index in entropies}
        self.hidden = None if hidden is None else hidden.select(indices)
        before = self.tokens
        self.scored = {new: self.scored[index] for new, index in enumerate(indices) if index in self.scored}
        self.dropped_tokens = before - self.tokens

    def __contains__(self, index: int) -> bool:
        return index in self.log_probs or (self.hidden is not None and index in self.hidden)
