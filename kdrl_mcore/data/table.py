"""A loaded data set: prompts in columns, which take far less memory than objects and can be shared by several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from kdrl_mcore.types import Prompt, TokenIds

if TYPE_CHECKING:
    import pyarrow as pa  # imported only where it is used: a run that loads no prompts does not need it


@cache
def schema() -> pa.Schema:
    """The columns: `row` counts from 1; `columns` is JSON; `question` is the hash of the problem without the template."""
    import pyarrow as pa

    ids = pa.large_list(pa.int32())
    return pa.schema(
        {
            "row": pa.int64(),
            "text": pa.large_string(),
            "token_ids": ids,
            "answer": pa.large_string(),
            "target": ids,
            "columns": pa.large_string(),
            "question": pa.uint64(),
            "teacher_prompts": pa.map_(pa.string(), ids),
        }
    )


@dataclass(frozen=True)
class PromptTable(Sequence[Prompt]):
    """A sequence of prompts, each built when it is accessed.

    Attributes:
        source: the file or hub id.
        name: the first part of each `prompt_id`.
        domain: see `Prompt`.
        table: the columns of `schema`, one row per prompt.
        dropped: the number of prompts of the data set that were dropped for their length.
    """

    source: str
    name: str
    domain: str
    table: pa.Table
    dropped: int = 0

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptTable: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptTable:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return PromptTable(self.source, self.name, self.domain, self.table.slice(start, max(0, stop - start)), self.dropped)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._prompt(self.table.slice(index % len(self), 1), 0)

    def __iter__(self) -> Iterator[Prompt]:
        for batch in self.table.to_batches(max_chunksize=1024):
            for index in range(batch.num_rows):
                yield self._prompt(batch, index)

    def _prompt(self, rows: pa.Table | pa.RecordBatch, index: int) -> Prompt:
        value = {name: rows.column(name)[index] for name in schema().names}
        columns = value["columns"].as_py()
        token_ids, target = _ids(value["token_ids"]), _ids(value["target"])
        assert token_ids is not None
        return Prompt(
            f"{self.name}-{value['row'].as_py()}",
            value["text"].as_py(),
            token_ids,
            value["answer"].as_py(),
            target,
            self.domain,
            {} if columns is None else json.loads(columns),
            {name: np.array(ids, dtype=np.int64) for name, ids in value["teacher_prompts"].as_py()},
        )

    def answers(self) -> Iterator[tuple[int, str]]:
        """The row and the reference answer of each prompt."""
        for batch in self.table.select(["row", "answer"]).to_batches(max_chunksize=1024):
            yield from zip(batch.column("row").to_pylist(), batch.column("answer").to_pylist(), strict=True)

    def questions(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The hash of each problem [prompts]."""
        return self.table.column("question").to_numpy()

    def write(self, path: Path) -> None:
        """Write the columns to a file that `read` can map."""
        import pyarrow as pa

        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema()) as writer:
            writer.write_table(self.table)

    def read(self, path: Path) -> PromptTable:
        """The same prompts with their columns mapped from the file, whose memory all processes of a machine share."""
        import pyarrow as pa

        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return PromptTable(self.source, self.name, self.domain, table, self.dropped)


def _ids(value: pa.LargeListScalar) -> TokenIds | None:
    return None if value.values is None else value.values.to_numpy().astype(np.int64)
