"""Data sets of prompts: from rows with a prompt and an answer to templated token ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kdrl_mcore.config import DataConfig, TeacherPromptConfig
from kdrl_mcore.data.columns import FieldReader, Fields, as_json, conversation
from kdrl_mcore.data.files import name_of, read_rows
from kdrl_mcore.data.rows import Row
from kdrl_mcore.data.table import PromptTable, schema
from kdrl_mcore.data.taught import HasColumns
from kdrl_mcore.data.templates import Template
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import DataError
from kdrl_mcore.types import Prompt, TokenIds

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
    teachers: Mapping[str, TeacherPrompts] = MappingProxyType({}),
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
        teachers: by name, the teachers that read other prompts (`Prompt.teacher_prompts`).
        on_chunk: called after each chunk of rows.

    Raises:
        DataError: there is no such file or data set, it has no rows, a column or the chat template is missing, or a row is not
            text or has too long a prompt; the message names the row and what to change.
        ConfigError: the template has no place for the prompt, or there is a system prompt with the plain template.
    """
    import pyarrow as pa

    reader = FieldReader(source, data, with_targets, needs_answers)
    rows = read_rows(source, reader.wanted, data.split, data.subset)
    template, dropped = Template(source, data, tokenizer, chat_date=data.chat_date), 0
    end = tokenizer.eos_id if template.is_plain or tokenizer.turn_end_id is None else tokenizer.turn_end_id
    chunks: list[pa.Table] = []
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        fields = [reader.read(row) for row in chunk]
        texts = [template.fill(row, each) for row, each in zip(chunk, fields, strict=True)]
        ids = template.encode(texts)
        views = {name: each.of(source, data, chunk, fields, domain) for name, each in teachers.items()}
        limits: list[tuple[str, Sequence[TokenIds | None], int, str]]
        limits = [("the prompt", ids, max_prompt_tokens, "rollout.max_prompt_tokens")]
        limits += [(f"what {name} reads", views[name], each.max_tokens, each.limit_key) for name, each in teachers.items()]
        kept = _short_enough(source, chunk, limits, long_prompts)
        dropped += len(chunk) - len(kept)
        targets = [None] * len(chunk) if not with_targets else _targets(fields, tokenizer, end)
        last = chunk[-1]
        chunks.append(_table([(chunk[i], fields[i], texts[i], ids[i], targets[i]) for i in kept], views, kept))
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


@dataclass(frozen=True)
class TeacherPrompts:
    """What a teacher reads before a response instead of the student's prompt.

    Attributes:
        settings: its template.
        section: where that is in the configuration.
        tokenizer: the teacher's own.
        max_tokens, limit_key: the most tokens that it may have, and the key that says so.
        reads: whether the teacher reads a prompt; None if it reads all.
    """

    settings: TeacherPromptConfig
    section: str
    tokenizer: Tokenizer
    max_tokens: int
    limit_key: str
    reads: Callable[[HasColumns], bool] | None = None

    def of(
        self, source: str, data: DataConfig, rows: Sequence[Row], fields: Sequence[Fields], domain: str = ""
    ) -> list[TokenIds | None]:
        """The token ids for these rows, None where the teacher does not read the row.

        Raises:
            ConfigError, DataError: see `Template`.
        """
        settings = {"section": self.section, "chat_date": data.chat_date, "columns": data.columns}
        template = Template(source, self.settings, self.tokenizer, **settings)  # type: ignore[arg-type]
        read = [self.reads is None or self.reads(_OfDomain(domain, each.columns)) for each in fields]
        taught = [(row, each) for row, each, reads in zip(rows, fields, read, strict=True) if reads]
        ids = iter(template.encode([template.fill(row, each) for row, each in taught]))
        return [next(ids) if reads else None for reads in read]


@dataclass(frozen=True)
class _OfDomain:
    """A row before it is a prompt."""

    domain: str
    columns: Mapping[str, Any]


def _short_enough(
    source: str,
    rows: Sequence[Row],
    limits: Sequence[tuple[str, Sequence[TokenIds | None], int, str]],
    long_prompts: str | None,
) -> list[int]:
    """The rows that are within all limits, each (what it limits, its token ids, the most of them, its key)."""
    kept = set(range(len(rows)))
    for what, ids, most, key in limits:
        for i, each in enumerate(ids):
            if each is None or 0 < len(each) <= most:
                continue
            if long_prompts != "drop" or not len(each):
                drop = ", or set data.long_prompts=drop" if long_prompts else ""
                raise DataError(
                    f"{source} {rows[i].where}: {what} has {len(each)} tokens, but must have 1 to {most}: raise {key} or "
                    f"remove the row{drop}"
                )
            kept.discard(i)
    return sorted(kept)


def _targets(fields: Sequence[Fields], tokenizer: Tokenizer, end: int) -> list:
    responses = [each.response or "" for each in fields]
    return [np.append(target, end) for target in tokenizer.encode(responses, special_tokens=False)]


def describe_prompt(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """One line with the exact text of a prompt as the model reads it: mistakes such as a literal `\\n` become visible."""
    text = tokenizer.show(prompt.token_ids)
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"
    return f"the first prompt, {prompt.prompt_id}, decoded from its {len(prompt.token_ids)} tokens: {shown}"


def _table(
    prompts: Sequence[tuple[Row, Fields, str, np.ndarray, np.ndarray | None]],
    views: Mapping[str, Sequence[TokenIds | None]],
    kept: Sequence[int],
) -> pa.Table:
    import pyarrow as pa

    columns = {
        "row": [row.number for row, *_ in prompts],
        "text": [text for _, _, text, _, _ in prompts],
        "token_ids": [ids.astype(np.int32) for *_, ids, _ in prompts],
        "answer": [fields.answer for _, fields, *_ in prompts],
        "target": [None if target is None else target.astype(np.int32) for *_, target in prompts],
        "columns": [as_json(fields.columns) if fields.columns else None for _, fields, *_ in prompts],
        "question": [question_hash(conversation(fields.messages)) for _, fields, *_ in prompts],
        "teacher_prompts": [
            [(name, own.astype(np.int32)) for name, ids in views.items() if (own := ids[i]) is not None] for i in kept
        ],
    }
    return pa.table({name: pa.array(values, schema().field(name).type) for name, values in columns.items()}, schema=schema())


def question_hash(question: str) -> int:
    """A hash that is equal for questions that differ only in white space and capital letters."""
    return xxhash.xxh3_64_intdigest(" ".join(question.split()).casefold().encode())
