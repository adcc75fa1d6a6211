"""Data sets of prompts: from rows with a prompt and an answer to templated token ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kdrl_mcore.config import DataConfig
from kdrl_mcore.data.columns import FieldReader, Fields, Messages, as_json, conversation
from kdrl_mcore.data.files import name_of, read_rows
from kdrl_mcore.data.rows import Row
from kdrl_mcore.data.table import PromptTable, schema
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.types import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 2048
"""The number of rows that are templated and tokenized at once."""
MAX_SHOWN = 1000
"""The most characters of a prompt that are shown; a longer prompt is shortened in the middle."""


def load_prompts(
    source: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    with_targets: bool = False,
    *,
    needs_answers: bool = True,
    domain: str = "",
    long_prompts: str | None = None,
    on_chunk: Callable[[], None] = lambda: None,
) -> PromptTable:
    """Every row of a data set as a `Prompt`, in order. A `prompt_id` is the data set's name and the row's number (from 1).

    Args:
        source: a `.jsonl`, `.json` or `.parquet` file, also gzipped, or the id of a data set on the Hugging Face hub, from
            which `data.split` (of `data.subset`) is read.
        data: the names of the columns, and the template.
        tokenizer: turns the templated prompt into ids. With the plain template it adds its special tokens; a chat
            template already contains them.
        max_prompt_tokens: a longer prompt is an error, or is dropped and counted if `long_prompts` is "drop".
        with_targets: also make the given response's token ids, which end with the end of sequence, or with the token that ends
            a turn in the chat template.
        needs_answers: every row must have an answer; supervised fine-tuning needs none.
        domain: see `Prompt`.
        long_prompts: see `data.long_prompts`; None if dropping prompts is not an option.
        on_chunk: called after each chunk of rows.

    Raises:
        DataError: there is no such file or data set, it has no rows, a column or the chat template is missing, or a row is not
            text or has too long a prompt; the message names the row and what to change.
        ConfigError: the template has no place for the prompt, or there is a system prompt with the plain template.
    """
    import pyarrow as pa

    reader = FieldReader(source, data, with_targets, needs_answers)
    rows = read_rows(source, reader.wanted, data.split, data.subset)
    template = _Template(source, data, tokenizer)
    plain, dropped = data.template == "plain", 0
    end = tokenizer.eos_id if plain or tokenizer.turn_end_id is None else tokenizer.turn_end_id
    chunks: list[pa.Table] = []
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        fields = [reader.read(row) for row in chunk]
        texts = [template.fill(row, each.messages) for row, each in zip(chunk, fields, strict=True)]
        ids = tokenizer.encode_prompts(texts) if plain else tokenizer.encode(texts, special_tokens=False)
        kept = [i for i in range(len(chunk)) if 0 < len(ids[i]) <= max_prompt_tokens]
        if len(kept) < len(chunk):
            first = next(i for i in range(len(chunk)) if not 0 < len(ids[i]) <= max_prompt_tokens)
            if long_prompts != "drop" or not all(map(len, ids)):
                drop = ", or set data.long_prompts=drop" if long_prompts else ""
                raise DataError(
                    f"{source} {chunk[first].where}: the prompt has {len(ids[first])} tokens, but must have 1 to "
                    f"{max_prompt_tokens}: raise rollout.max_prompt_tokens or remove the row{drop}"
                )
            dropped += len(chunk) - len(kept)
        targets = [None] * len(chunk) if not with_targets else _targets(fields, tokenizer, end)
        last = chunk[-1]
        chunks.append(_table([(chunk[i], fields[i], texts[i], ids[i], targets[i]) for i in kept]))
        on_chunk()
    if not chunks:
        raise DataError(f"{source} has no rows")
    reader.finish(last)
    table = pa.concat_tables(chunks)
    if table.num_rows == 0:
        raise DataError(
            f"all {dropped} prompts of {source} have over {max_prompt_tokens} tokens: raise rollout.max_prompt_tokens"
        )
    return PromptTable(source, name_of(source), domain, table, dropped)


def _targets(fields: Sequence[Fields], tokenizer: Tokenizer, end: int) -> list:
    responses = [each.response or "" for each in fields]
    return [np.append(target, end) for target in tokenizer.encode(responses, special_tokens=False)]


def describe_prompt(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """One line with the exact text of a prompt as the model reads it: mistakes such as a literal `\\n` become visible."""
    text = tokenizer.show(prompt.token_ids)
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"
    return f"the first prompt, {prompt.prompt_id}, decoded from its {len(prompt.token_ids)} tokens: {shown}"


def _table(prompts: Sequence[tuple[Row, Fields, str, np.ndarray, np.ndarray | None]]) -> pa.Table:
    import pyarrow as pa

    columns = {
        "row": [row.number for row, *_ in prompts],
        "text": [text for _, _, text, _, _ in prompts],
        "token_ids": [ids.astype(np.int32) for *_, ids, _ in prompts],
        "answer": [fields.answer for _, fields, *_ in prompts],
        "target": [None if target is None else target.astype(np.int32) for *_, target in prompts],
        "columns": [as_json(fields.columns) if fields.columns else None for _, fields, *_ in prompts],
        "question": [question_hash(conversation(fields.messages)) for _, fields, *_ in prompts],
    }
    return pa.table({name: pa.array(values, schema().field(name).type) for name, values in columns.items()}, schema=schema())


def question_hash(question: str) -> int:
    """A hash that is equal for questions that differ only in white space and capital letters."""
    return xxhash.xxh3_64_intdigest(" ".join(question.split()).casefold().encode())


class _Template:
    """The chat template with its messages, or the plain template, of one data set."""

    def __init__(self, source: str, data: DataConfig, tokenizer: Tokenizer) -> None:
        self._source, self._data, self._tokenizer = source, data, tokenizer
        self._today = _date(data.chat_date)
        if data.template == "plain" and data.system_prompt is not None:
            raise ConfigError("data.system_prompt needs data.template=chat: for plain, write it into data.plain_template")
        if data.template != "plain" and not tokenizer.has_chat_template:
            raise DataError(f"{tokenizer.path} has no chat template, which {source} needs: set data.template=plain")
        key = "plain_template" if data.template == "plain" else "message_template"
        self._text: str = getattr(data, key)
        if "{prompt}" not in self._text:
            raise ConfigError(f"data.{key}={self._text!r} lacks {{prompt}}, which stands for the prompt: add it")

    def fill(self, row: Row, messages: Messages) -> str:
        *before, last = messages
        text = self._text.replace("{prompt}", last["content"])
        if self._data.template == "plain":
            if before:
                raise DataError(
                    f"{self._source} {row.where}: the prompt has {len(messages)} messages, but data.template=plain takes only "
                    "one: set data.template=chat"
                )
            return text
        system = [] if self._data.system_prompt is None else [{"role": "system", "content": self._data.system_prompt}]
        return self._tokenizer.chat_text([*system, *before, {"role": last["role"], "content": text}], self._today)


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(f"data.chat_date={text} is not a date: write it as 2024-07-26") from error
