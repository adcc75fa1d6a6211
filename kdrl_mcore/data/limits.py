"""The limits of a run's models: the token ids that they have embeddings for, and the lengths that their positions allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kdrl_mcore.config import Config, NamedTeacherConfig
from kdrl_mcore.config.derived import (
    TEACHER,
    has_several_teachers,
    known_models,
    longest_response,
    prompts_of_teachers,
    role_of,
    section_of,
)
from kdrl_mcore.data.taught import teaches
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


def check_prompts(
    prompts: Sequence[Prompt],
    source: str,
    limits: Limits,
    max_response_tokens: int | None,
    key: str = "rollout.max_response_tokens",
) -> None:
    """Check that prompts, with the longest response to each and with their targets, are within the limits.

    Args:
        max_response_tokens: the limit of sampled responses, which then applies to targets too; None if none are sampled.
        key: where it is set.

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
        lower = f"set {key} to at most {remaining}, or " if remaining > 0 else ""
        raise DataError(
            f"{source} row {longest_row}: a prompt of {longest} tokens and {key}={max_response_tokens} "
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


def limits_of(config: Config, tokens: int) -> Limits:
    """The limits of the student, and of the teacher if it is the only one: of several, each reads only the prompts that it
    teaches (`check_teacher_prompts`).

    Raises:
        ModelError: one of the models is not a model.
    """
    models = known_models(config)
    return Limits.of(tokens, [models["student"]] if has_several_teachers(config) else list(models.values()))


def check_teacher_prompts(
    prompts: Sequence[Prompt], source: str, config: Config, unshared: Mapping[str, Collection[int]] = MappingProxyType({})
) -> None:
    """Check that each teacher can read what stands before responses, with the longest response to it.

    Args:
        unshared: by teacher, the token ids that mean something else to it.

    Raises:
        DataError: it cannot; the message names the row (from 1).
    """
    longest = longest_response(config) or 0
    for reader in _readers(config, unshared):
        for row, prompt in enumerate(prompts, start=1):
            if reader.reads(prompt):
                ids = prompt.teacher_prompts[reader.name] if reader.own else prompt.token_ids
                given = 0 if prompt.target is None else len(prompt.target)
                reader.check(f"{source} row {row}", ids, max(given, longest))


def check_teacher_rollouts(
    rollouts: Sequence[Rollout],
    path: str | Path,
    config: Config,
    unshared: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> None:
    """Check that a file's rollouts hold what each teacher reads, and that it can read it.

    Raises:
        DataError: as `check_teacher_prompts`; the message names the line (from 1).
    """
    for reader in _readers(config, unshared):
        for line, rollout in enumerate(rollouts, start=1):
            if not reader.reads(rollout):
                continue
            where = f"{path} line {line}"
            ids = rollout.teacher_prompts.get(reader.name) if reader.own else rollout.prompt_token_ids
            if ids is None:
                raise DataError(
                    f"{where} has no teacher_prompts.{reader.name}, which {reader.section}.prompt.template={reader.template} "
                    "asks for: name a file of a run that had this setting, or set it to student"
                )
            reader.check(where, ids, len(rollout.response_token_ids))


@dataclass(frozen=True)
class _Reader:
    """A teacher, and what it can read.

    Attributes:
        section, template: where its settings are, and the template of its prompts.
        own: whether it reads other prompts than the student.
        limits: those of its model.
        unshared: token ids that its prompts must not have.
        settings: if it is one of several.
    """

    name: str
    section: str
    template: str
    own: bool
    limits: Limits
    unshared: Collection[int]
    settings: NamedTeacherConfig | None

    def reads(self, item: Prompt | Rollout) -> bool:
        """Whether it teaches this prompt."""
        return self.settings is None or teaches(self.settings, item)

    def check(self, where: str, ids: TokenIds, response_tokens: int) -> None:
        """Check that it can read these ids with a response of this length."""
        what = "what the teacher reads" if self.settings is None else f"what the teacher {self.name} reads"
        prompt, model = f"{self.section}.prompt", self.limits.model
        largest = int(ids.max())
        if largest >= self.limits.tokens:
            raise DataError(
                f"{where}: {what} has token id {largest}, but {model} has only {self.limits.tokens} rows: change "
                f"{prompt}, or resize the model's embeddings to its tokenizer"
            )
        if len(ids) + response_tokens > self.limits.positions:
            raise DataError(
                f"{where}: {what} has {len(ids)} tokens, and with a response of {response_tokens} exceeds the "
                f"{self.limits.positions} positions of {model} (max_position_embeddings): shorten {prompt}, or remove the row"
            )
        other = sorted(set(ids.tolist()) & set(self.unshared))
        if other:
            raise DataError(
                f"{where}: the prompt has token {other[0]}, which is another one in the teacher's tokenizer: let the teacher "
                f"read its own template ({prompt}.template=chat)"
            )


def _readers(config: Config, unshared: Mapping[str, Collection[int]]) -> list[_Reader]:
    """The teachers whose prompts `check_prompts` and `check_rollouts` do not already check. The model that reads them is the
    teacher, or the student where it teaches itself."""
    models, prompts, readers = known_models(config), prompts_of_teachers(config), []
    for name in config.teachers if has_several_teachers(config) else [TEACHER]:
        own, settings = name in prompts, config.teachers.get(name)
        if settings is None and not own and not unshared.get(name):
            continue
        model = models.get(role_of(name), models["student"])
        limits = Limits.of(read_architecture(model).vocab_size, [model])
        template = prompts[name].template if own else "student"
        other = () if own else unshared.get(name, ())
        readers.append(_Reader(name, section_of(config, name), template, own, limits, other, settings))
    return readers
