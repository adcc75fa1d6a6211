"""The vocabulary columns that count in every softmax of a run: those of the tokens that all its models share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdrl_mcore.data.tokenizers import Tokenizer, check_same_tokenizer, different_added_tokens, load_tokenizer
from kdrl_mcore.errors import DataError
from kdrl_mcore.model.families import config_folder, read_architecture


def shared_vocabulary(
    student: str | Path, *teachers: str | Path | None, added_may_differ: bool = False
) -> tuple[Tokenizer | None, int]:
    """The student's tokenizer, and the number of tokens that count: those of the shared tokenizer for which all models have
    columns.

    A model directory without a tokenizer can still be used on given token ids: then the tokenizer is None, and the number is
    the smaller number of columns.

    Args:
        added_may_differ: the tokenizers may have different added tokens (`unshared_tokens`).

    Raises:
        ModelError, DataError: a directory is not a model, its tokenizer cannot be read or ends responses with a token for which
            a model has no row, or a teacher's tokenizer differs from the student's.
    """
    paths = [student, *(teacher for teacher in teachers if teacher)]
    sizes = [read_architecture(path).vocab_size for path in paths]
    if not _has_tokenizer(student):
        return None, min(sizes)
    tokenizer = load_tokenizer(config_folder(student))
    end = min(tokenizer.eos_ids)
    for path, size in zip(paths, sizes, strict=True):
        if end >= size:
            raise DataError(
                f"{path} has {size} rows, and {student} ends its responses with token {end} ({tokenizer.tokens.get(end)!r}): "
                "resize the model's embeddings to its tokenizer, or use the tokenizer that it was trained with"
            )
    sizes.append(tokenizer.vocab_size)
    for teacher in paths[1:]:
        if _has_tokenizer(teacher):
            other = load_tokenizer(config_folder(teacher))
            but = different_added_tokens(tokenizer, other) if added_may_differ else frozenset()
            sizes.append(check_same_tokenizer(tokenizer, other, but))
    return tokenizer, min(sizes)


def named_tokens(tokens: Mapping[int, str]) -> str:
    """Token ids and their texts, for a message."""
    return " or ".join(f"{index} ({text!r})" for index, text in sorted(tokens.items()))


def unshared_tokens(student: str | Path, teacher: str | Path) -> dict[int, str]:
    """The student's added tokens, by their ids, at which the teacher has another one or none. What follows one of them cannot
    be read by the teacher.

    Raises:
        DataError: a tokenizer cannot be read.
    """
    if not _has_tokenizer(student) or not _has_tokenizer(teacher):
        return {}
    mine, other = (load_tokenizer(config_folder(path)) for path in (student, teacher))
    return {index: mine.tokens.get(index, "?") for index in sorted(different_added_tokens(mine, other))}


def stop_tokens(path: str | Path) -> dict[int, str] | None:
    """The tokens that end a model's responses, by their ids; None if the model has no tokenizer.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    if not _has_tokenizer(path):
        return None
    tokenizer = load_tokenizer(config_folder(path))
    return {index: tokenizer.tokens.get(index, "?") for index in tokenizer.eos_ids}


def _has_tokenizer(path: str | Path) -> bool:
    return (config_folder(path) / "tokenizer.json").is_file()
