"""The responses of an evaluation on disk: one rollout file for each finished block of prompts, so that it can resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_mcore.config import flatten
from kdrl_mcore.errors import DataError
from kdrl_mcore.resilience.files import write_file
from kdrl_mcore.rollout.files import read_rollouts, write_rollouts
from kdrl_mcore.types import Prompt, Rollout

SETTINGS_FILE = "settings.json"


class Generations:
    """The files `FOLDER/BENCHMARK/MODE_000001.jsonl`, each with the verified responses to a block of prompts, and next to them
    the settings that they depend on.

    To be used on one rank. A file exists only once it is complete.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Args:
            settings: what the responses depend on, to be stored as JSON. With it, blocks found in the folder are reused;
                without it, they are overwritten.

        Raises:
            DataError: the folder holds responses made with other settings (naming the first difference).
        """
        self._folder = folder
        self._resumes = settings is not None
        if settings is None:
            return
        file = folder / SETTINGS_FILE
        wanted = json.dumps(settings, indent=2, sort_keys=True)
        if file.is_file() and (difference := _difference(file, json.loads(wanted))):
            raise DataError(f"{folder} has an evaluation with other settings, {difference}: name another folder, or remove it")
        write_file(file, wanted)

    def read(
        self, benchmark: str, mode: str, block: int, prompts: Sequence[Prompt], responses_per_prompt: int
    ) -> list[Rollout] | None:
        """The responses of a finished block; None if it is not finished.

        Raises:
            DataError: the file is damaged, or its responses are to other prompts.
        """
        file = self._file(benchmark, mode, block)
        if not self._resumes or not file.is_file():
            return None
        rollouts = read_rollouts(file)
        asked = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
        if len(asked) != len(rollouts) or not all(
            np.array_equal(rollout.prompt_token_ids, prompt.token_ids) and rollout.answer == prompt.answer
            for rollout, prompt in zip(rollouts, asked, strict=True)
        ):
            raise DataError(f"{file} has responses to prompts other than {benchmark}'s: name another folder, or remove it")
        return rollouts

    def write(self, benchmark: str, mode: str, block: int, rollouts: Sequence[Rollout]) -> None:
        """Write the responses of a block."""
        write_rollouts(self._file(benchmark, mode, block), rollouts)

    def _file(self, benchmark: str, mode: str, block: int) -> Path:
        return self._folder / benchmark / f"{mode}_{block + 1:06d}.jsonl"


def _difference(file: Path, wanted: Mapping[str, Any]) -> str | None:
    """The first setting that differs, in the form `rollout.engine was "megatron" and is now "vllm"`."""
    try:
        before, now = flatten(json.loads(file.read_text(encoding="utf-8"))), flatten(wanted)
    except (ValueError, AttributeError):
        return f"{file} is damaged"
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return f"{key} was {json.dumps(before.get(key))} and is now {json.dumps(now.get(key))}"
    return None
