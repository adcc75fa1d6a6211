"""Replay: train on the responses of a rollout file, with their recorded rewards and sampler log-probs."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.errors import DataError
from kdrl_mcore.rollout.files import read_rollouts
from kdrl_mcore.types import Rollout


class ReplayEngine:
    """Gives the whole file at every step. Nothing is sampled and nothing verified."""

    def __init__(self, path: str | Path, vocabulary: int) -> None:
        """Raises DataError if the file is missing or damaged, or holds a token id that is not below `vocabulary`."""
        self._rollouts = read_rollouts(Path(path))
        for line, rollout in enumerate(self._rollouts, start=1):
            largest = max(int(rollout.prompt_token_ids.max()), int(rollout.response_token_ids.max()))
            if largest >= vocabulary:
                raise DataError(
                    f"{path} line {line}: token id {largest} is not one of the {vocabulary} tokens of the models: replay "
                    "rollouts of the same tokenizer"
                )

    def rollouts(self) -> list[Rollout]:
        """The file's rollouts, the same on every rank."""
        return list(self._rollouts)
