"""The limits of a run's models: the token ids that they have embeddings for, and the lengths that their positions allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import TEACHER, reads_own_prompt, used_models
from kdrl_mcore.errors import DataError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.types import Prompt, Rollout, TokenIds


@dataclass(frozen=True)
class Limits:
    """The limits common to all models that process a sequence.

    Attributes:
        tokens: each of the models knows all token ids below this number.
        positions: the length of the longest sequence, prompt and response together, in tokens.
        model: the model that has these positions, for error messages.
    """

    tokens: int
    positions: int
    model: str

    @staticmethod
    def of(tokens: int, models: Sequence[str | Path]) -> Limits:
        """The limits of these models (the student first), which share `tokens` token ids.

        Raises:
            ModelError: one of the paths is not a model.
        """
        positions = {str(model): read_architecture(model).context_length for model in models}
        shortest = min(positions, key=lambda model: positions[model])
        return Limits(tokens, positions[shortest], shortest)


def check_prompts(prompts: Sequence[Prompt], source: str, limits: Limits, max_response_tokens: int | None) -> None:
    """Check that prompts, with the longest response to each and with their targets, are within the limits.

    Args:
        max_response_tokens: the limit of sampled responses, which then applies to targets too; None if none are sampled.

    Raises:
        DataError: one is not; the message names its row (from 1) and what to change.
    """
    longest, longest_row = 0, 0
    for row, prompt in enumerate(prompts, start=1):
        largest = max(int(ids.max(initial=0)) for ids in (prompt.token_ids, prompt.target) if ids is not None)
        if largest >= limits.tokens:
            raise DataError(
                f"{source} row {row} has token id {largest}, but the models know only {limits.tokens} tokens (0 to "
                f"{limits.tokens - 1}): a model has no row for it, or the teacher's tokenizer lacks it; resize the embeddings, "
                "or use the tokenizer that the model was trained with"
            )
        if prompt.target is not None and len(prompt.token_ids) + len(prompt.target) > limits.positions:
            raise DataError(
                f"{source} row {row}: prompt and response have {len(prompt.token_ids)} and {len(prompt.target)} tokens, more "
                f"than the {limits.positions} positions of {limits.model} (max_position_embeddings): remove the row"
            )
        if max_response_tokens is not None:
            if prompt.target is not None:
                check_given_length(f"{source} row {row}", prompt.target, max_response_tokens)
            if len(prompt.token_ids) > longest:
                longest, longest_row = len(prompt.token_ids), row
    if max_response_tokens is not None and longest + max_response_tokens > limits.positions:
        remaining = limits.positions - longest
        lower = f"set rollout.max_response_tokens to at most {remaining}, or " if remaining > 0 else ""
        raise DataError(
            f"{source} row {longest_row}: a prompt of {longest} tokens and rollout.max_response_tokens={max_response_tokens} "
            f"exceed the {limits.positions} positions of {limits.model} (max_position_embeddings): {lower}remove longer prompts"
        )


def teacher_limits(config: Config, tokens: int) -> Limits:
    """The limits of the model that reads the teacher's prompts: the teacher, or the student where it teaches itself."""
    models = used_models(config)
    return Limits.of(tokens, [models.get("teacher", models["student"])])


def check_teacher_prompts(prompts: Sequence[Prompt], source: str, limits: Limits, max_response_tokens: int | None) -> None:
    """Check that what teachers read instead of prompts, with the longest response, is within their limits.

    Raises:
        DataError: it is not; the message names the row (from 1).
    """
    for row, prompt in enumerate(prompts, start=1):
        given = 0 if prompt.target is None else len(prompt.target)
        for ids in prompt.teacher_prompts.values():
            _check_teacher_prompt(f"{source} row {row}", ids, max(given, max_response_tokens or 0), limits)


def _check_teacher_prompt(where: str, ids: TokenIds, response_tokens: int, limits: Limits) -> None:
    largest = int(ids.max())
    if largest >= limits.tokens:
        raise DataError(
            f"{where}: what the teacher reads has token id {largest}, but the models share only {limits.tokens} tokens: change "
            "teacher.prompt, or use a teacher with the student's tokenizer"
        )
    if len(ids) + response_tokens > limits.positions:
        raise DataError(
            f"{where}: what the teacher reads has {len(ids)} tokens, and with a response of {response_tokens} exceeds the "
            f"{limits.positions} positions of {limits.model} (max_position_embeddings): shorten teacher.prompt, or remove the "
            "row"
        )


def check_given_length(where: str, response: TokenIds, max_response_tokens: int) -> None:
    """Check that a response that is given in addition to sampled ones is not longer than their limit.

    Raises:
        DataError: it is; the message begins with `where`.
    """
    if len(response) > max_response_tokens:
        raise DataError(
            f"{where}: the given response has {len(response)} tokens, more than "
            f"rollout.max_response_tokens={max_response_tokens}: raise it, or remove the response"
        )


def check_rollouts(rollouts: Sequence[Rollout], path: str | Path, limits: Limits) -> None:
    """Check that the rollouts of a file are within the limits.

    Raises:
        DataError: one is not; the message names its line (from 1).
    """
    for line, rollout in enumerate(rollouts, start=1):
        largest = max(int(rollout.prompt_token_ids.max()), int(rollout.response_token_ids.max()))
        if largest >= limits.tokens:
            raise DataError(
                f"{path} line {line}: token id {largest} is not one of the models' {limits.tokens} tokens: name a file of "
                "rollouts made with the same tokenizer"
            )
        if rollout.num_tokens > limits.positions:
            raise DataError(
                f"{path} line {line}: prompt and response have {rollout.num_tokens} tokens, more than the {limits.positions} "
                f"positions of {limits.model} (max_position_embeddings): remove the line, or use a model with a longer context"
            )


def check_teacher_rollouts(rollouts: Sequence[Rollout], path: str | Path, config: Config, tokens: int) -> None:
    """Check that a file's rollouts hold what the teacher reads, where that is not the prompt, within its limits.

    Raises:
        DataError: one does not; the message names its line (from 1).
    """
    if not reads_own_prompt(config):
        return
    limits = teacher_limits(config, tokens)
    for line, rollout in enumerate(rollouts, start=1):
        where, ids = f"{path} line {line}", rollout.teacher_prompts.get(TEACHER)
        if ids is None:
            raise DataError(
                f"{where} has no teacher_prompts.{TEACHER}, which teacher.prompt.template={config.teacher.prompt.template} "
                "asks for: name a file of a run that had this setting, or set it to student"
            )
        _check_teacher_prompt(where, ids, len(rollout.response_token_ids), limits)
