"""Which vocabulary columns exist: for every softmax of a run, those of the tokens that all its models share."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.data.tokenizers import Tokenizer, check_same_tokenizer, load_tokenizer
from kdrl_mcore.model.families import read_architecture


def shared_vocabulary(student: str | Path, teacher: str | Path | None = None) -> tuple[Tokenizer | None, int]:
    """The student's tokenizer, and how many tokens count: those of the shared tokenizer, as far as both models have columns.

    A model directory without a tokenizer can still be used on given token ids: then there is no tokenizer (None), and the
    smaller number of columns counts.

    Raises:
        ModelError, DataError: a directory is no model, its tokenizer cannot be read, or the two tokenizers differ.
    """
    paths = [student, *([teacher] if teacher else [])]
    sizes = [read_architecture(path).vocab_size for path in paths]
    if not _has_tokenizer(student):
        return None, min(sizes)
    tokenizer = load_tokenizer(student)
    sizes.append(tokenizer.vocabulary_size)
    if teacher and _has_tokenizer(teacher):
        sizes.append(check_same_tokenizer(tokenizer, load_tokenizer(teacher)))
    return tokenizer, min(sizes)


def _has_tokenizer(path: str | Path) -> bool:
    return (Path(path) / "tokenizer.json").is_file()
