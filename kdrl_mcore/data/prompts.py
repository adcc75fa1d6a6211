"""Data sets of prompts: from rows with a prompt and an answer to templated token ids."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrl_mcore.config import DataConfig
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.reward.answers import answer_text
from kdrl_mcore.types import Prompt

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_prompts(
    source: str, data: DataConfig, tokenizer: Tokenizer, max_prompt_tokens: int, with_targets: bool = False
) -> list[Prompt]:
    """Every row of a data set as a `Prompt`, in order. A `prompt_id` is the data set's name and the row's number (from 1).

    Args:
        source: a `.jsonl`, `.json` or `.parquet` file, or the id of a data set on the Hugging Face hub, of which
            `data.split` (of `data.subset`) is read.
        data: the columns' names and the template.
        tokenizer: turns the templated prompt into ids. With the plain template it adds its special tokens; a chat
            template holds them already.
        max_prompt_tokens: a longer prompt is an error.
        with_targets: for supervised fine-tuning: also the response's ids, ended by the end of sequence. The answer's
            column may then be missing.

    Raises:
        DataError: no such file or data set, a missing column, no rows, a row that is not text or has too long a prompt, or no
            chat template; naming the row and what to change.
        ConfigError: the template has no place for the prompt, or there is a system prompt with the plain template.
    """
    table = _read(source, data.split, data.subset)
    if len(table) == 0:
        raise DataError(f"{source} holds no rows")
    prompts = _texts(table, source, data.prompt_key, "data.prompt_key")
    if data.context_key is not None:
        contexts = _column(table, source, data.context_key, "data.context_key")
        prompts = [f"{context}\n{prompt}" if context else prompt for context, prompt in zip(contexts, prompts, strict=True)]
    has_answers = not with_targets or data.answer_key in table.column_names
    answers = _texts(table, source, data.answer_key, "data.answer_key", answers=True) if has_answers else [""] * len(table)
    texts = _apply_template(prompts, source, data, tokenizer)
    ids = tokenizer.encode(texts, special_tokens=data.template == "plain")
    for row, token_ids in enumerate(ids, start=1):
        if not 0 < len(token_ids) <= max_prompt_tokens:
            raise DataError(
                f"{source} row {row}: the prompt has {len(token_ids)} tokens, allowed are 1 to {max_prompt_tokens}: "
                "raise rollout.max_prompt_tokens or remove the row"
            )
    targets: list[Any] = [None] * len(table)
    if with_targets:
        responses = _texts(table, source, data.response_key, "data.response_key")
        targets = [np.append(target, tokenizer.eos_id) for target in tokenizer.encode(responses, special_tokens=False)]
    name = Path(source).stem
    rows = enumerate(zip(texts, ids, answers, targets, strict=True), start=1)
    return [Prompt(f"{name}-{row}", text, token_ids, answer, target) for row, (text, token_ids, answer, target) in rows]


def load_answers(source: str, data: DataConfig) -> list[str]:
    """The reference answers of a data set alone, in order.

    Raises:
        DataError: see `load_prompts`.
    """
    return _texts(_read(source, data.split, data.subset), source, data.answer_key, "data.answer_key", answers=True)


def _read(source: str, split: str, subset: str | None) -> datasets.Dataset:
    """The rows of a file (which leaves nothing in the data sets' cache), or of a hub data set's split."""
    import datasets  # a second, which runs that load nothing need not wait for

    path = Path(source)
    kinds = ", ".join(_BUILDERS)
    if path.is_file() and path.suffix in _BUILDERS:
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty")
        with _quietly(source), tempfile.TemporaryDirectory() as cache:
            builder = _BUILDERS[path.suffix]
            return datasets.load_dataset(builder, data_files=source, split="train", cache_dir=cache, keep_in_memory=True)
    if path.exists():
        raise DataError(f"{source} is not a {kinds} file: name one, or the id of a data set on the hub")
    if path.suffix in _BUILDERS or not _HUB_ID.fullmatch(source):
        raise DataError(f"{source} does not exist: name a {kinds} file, or the id of a data set on the hub")
    with _quietly(f"{source} (no such file, so taken for a hub id, split {split})"):
        return datasets.load_dataset(source, subset, split=split)


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Read without progress bars and log lines (both are as before afterwards), and with one line for whatever goes wrong."""
    import datasets

    bars_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except Exception as error:  # each format's library raises its own
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        if "corresponds to no data" in cause:  # how the library says that a file has no rows
            raise DataError(f"{what} holds no rows") from error
        raise DataError(f"{what} cannot be read: {cause}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_off:
            datasets.enable_progress_bars()


def _column(table: datasets.Dataset, source: str, column: str, key: str) -> list[Any]:
    if column not in table.column_names:
        raise DataError(f"{source} has no column '{column}' (it has: {', '.join(table.column_names)}): set {key}")
    return list(table[column])


def _texts(table: datasets.Dataset, source: str, column: str, key: str, answers: bool = False) -> list[str]:
    """A column as non-empty texts. Of `answers`, numbers and lists are written out (`answer_text`)."""
    values = _column(table, source, column, key)
    for index, value in enumerate(values):
        if answers and (text := answer_text(value)) is not None:
            values[index] = text
        elif not isinstance(value, str) or not value.strip():
            what = "empty" if value is None or isinstance(value, str) else f"{value!r}, not text"
            raise DataError(f"{source} row {index + 1}: '{column}' is {what}: write it as a string, or set {key}")
    return values


def _apply_template(prompts: list[str], source: str, data: DataConfig, tokenizer: Tokenizer) -> list[str]:
    if data.template == "plain":
        if data.system_prompt is not None:
            raise ConfigError("data.system_prompt needs data.template=chat; with plain, write it into data.plain_template")
        return _fill("plain_template", data.plain_template, prompts)
    if not tokenizer.has_chat_template:
        raise DataError(f"{tokenizer.path} has no chat template, which {source} needs: set data.template=plain")
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    messages = _fill("message_template", data.message_template, prompts)
    return [tokenizer.chat_text([*system, {"role": "user", "content": message}]) for message in messages]


def _fill(key: str, template: str, prompts: list[str]) -> list[str]:
    if "{prompt}" not in template:
        raise ConfigError(f"data.{key}={template!r} lacks {{prompt}}, the place of the prompt")
    return [template.replace("{prompt}", prompt) for prompt in prompts]
