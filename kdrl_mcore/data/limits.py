"""The limits of a run's models: the token ids that they have embeddings for, and the lengths that their positions allow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import TEACHER, longest_response, reads_own_prompt, used_models
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


def check_teacher_prompts(prompts: Sequence[Prompt], source: str, config: Config, unshared: Collection[int] = ()) -> None:
    """Check that the teacher can read what stands before responses, with the longest response to it.

    Args:
        unshared: token ids that mean something else to the teacher.

    Raises:
        DataError: it cannot; the message names the row (from 1).
    """
    own, longest = reads_own_prompt(config), longest_response(config) or 0
    if not own and not unshared:
        return
    limits = _teacher_limits(config)
    for row, prompt in enumerate(prompts, start=1):
        ids = prompt.teacher_prompts[TEACHER] if own else prompt.token_ids
        given = 0 if prompt.target is None else len(prompt.target)
        _check_teacher_prompt(f"{source} row {row}", ids, max(given, longest), limits, () if own else unshared)


def check_teacher_rollouts(
    rollouts: Sequence[Rollout], path: str | Path, config: Config, unshared: Collection[int] = ()
) -> None:
    """Check that a file's rollouts hold what the teacher reads, and that it can read it.

    Raises:
        DataError: as `check_teacher_prompts`; the message names the line (from 1).
    """
    own = reads_own_prompt(config)
    if not own and not unshared:
        return
    limits = _teacher_limits(config)
    for line, rollout in enumerate(rollouts, start=1):
        where, ids = f"{path} line {line}", rollout.teacher_prompts.get(TEACHER) if own else rollout.prompt_token_ids
        if ids is None:
            raise DataError(
                f"{where} has no teacher_prompts.{TEACHER}, which teacher.prompt.template={config.teacher.prompt.template} "
                "asks for: name a file of a run that had this setting, or set it to student"
            )
        _check_teacher_prompt(where, ids, len(rollout.response_token_ids), limits, () if own else unshared)


def _teacher_limits(config: Config) -> Limits:
    """Those of the model that reads the teacher's prompts: the teacher, or the student where it teaches itself."""
    models = used_models(config)
    model = models.get("teacher", models["student"])
    return Limits.of(read_architecture(model).vocab_size, [model])


def _check_teacher_prompt(where: str, ids: TokenIds, response_tokens: int, limits: Limits, unshared: Collection[int]) -> None:
    largest = int(ids.max())
    if largest >= limits.tokens:
        raise DataError(
            f"{where}: what the teacher reads has token id {largest}, but {limits.model} has only {limits.tokens} rows: change "
            "teacher.prompt, or resize the model's embeddings to its tokenizer"
        )
    if len(ids) + response_tokens > limits.positions:
        raise DataError(
            f"{where}: what the teacher reads has {len(ids)} tokens, and with a response of {response_tokens} exceeds the "
            f"{limits.positions} positions of {limits.model} (max_position_embeddings): shorten teacher.prompt, or remove the "
            "row"
        )
    other = sorted(set(ids.tolist()) & set(unshared))
    if other:
        raise DataError(
            f"{where}: the prompt has token {other[0]}, which is another one in the teacher's tokenizer: let the teacher read "
            "its own template (teacher.prompt.template=chat)"
        )
