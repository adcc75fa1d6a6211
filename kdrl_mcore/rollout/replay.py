"""Replay: train on the responses of a rollout file, with their recorded rewards and sampler log-probs."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.rollout.files import check_token_ids, read_rollouts
from kdrl_mcore.types import Rollout


class ReplayEngine:
    """Gives the whole file at every step. Nothing is sampled and nothing verified."""

    def __init__(self, path: str | Path, vocabulary: int) -> None:
        """Raises DataError if the file is missing or damaged, or holds a token id that is not below `vocabulary`."""
        self._rollouts = read_rollouts(Path(path))
        check_token_ids(path, self._rollouts, vocabulary)

    def rollouts(self) -> list[Rollout]:
        """The file's rollouts, the same on every rank."""
        return list(self._rollouts)
