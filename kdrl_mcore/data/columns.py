"""From the columns of a row to the parts of a prompt: messages, the reference answer, and columns for rewards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kdrl_mcore.config import DataConfig
from kdrl_mcore.data.rows import MISSING, Row
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.reward.answers import answer_text
from kdrl_mcore.reward.choices import chosen

Messages = list[dict[str, str]]
"""A conversation as chat templates take it: `role` and `content` of each message."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Fields:
    """The contents of a row: the conversation up to the response, the reference answer, the given response (where it is
    read), and the columns of `data.columns` by their keys."""

    messages: Messages
    answer: str
    response: str | None
    columns: dict[str, Any]


class _Choice(NamedTuple):
    """One choice: the letter before its text in the prompt, its label in the row, and its text."""

    letter: str
    label: str
    text: str


class FieldReader:
    """Reads the `Fields` of a data set's rows by the column names of its configuration."""

    def __init__(self, source: str, data: DataConfig, with_targets: bool, needs_answers: bool = True) -> None:
        """Args:
            source: the data set's name, for error messages.
            with_targets: the given response is read too.
            needs_answers: every row must have an answer.

        Raises:
            ConfigError: `data.prompt_pattern` is not a regular expression with exactly one group.
        """
        self._source, self._data = source, data
        self._with_targets, self._needs_answers = with_targets, needs_answers
        self._unseen = dict.fromkeys(data.columns, "data.columns")
        if data.context_key is not None:
            self._unseen[data.context_key] = "data.context_key"
        self._pattern = None if data.prompt_pattern is None else _compiled(data.prompt_pattern)

    @property
    def wanted(self) -> list[str]:
        """The keys of the columns that are read."""
        data = self._data
        keys = [data.prompt_key, data.answer_key, data.context_key, data.choices_key, *data.columns]
        return [key for key in [*keys, data.response_key if self._with_targets else None] if key]

    def read(self, row: Row) -> Fields:
        """The fields of a row.

        Raises:
            DataError: a column is missing, empty or of the wrong type; the message names the row and the key to set.
        """
        data = self._data
        messages = self._messages(row)
        choices = None if data.choices_key is None else self._choices(row, data.choices_key)
        problem = messages[-1]["content"]
        if self._pattern is not None:
            problem = self._problem(row, problem, self._pattern)
        if data.context_key is not None and (context := self._optional(row, data.context_key)):
            problem = f"{context}\n{problem}"
        if choices is not None:
            problem += "".join(f"\n{choice.letter}. {choice.text}" for choice in choices)
        messages[-1] = {**messages[-1], "content": problem}
        response = self._text(row, data.response_key, "data.response_key") if self._with_targets else None
        columns = {key: self._optional(row, key) for key in data.columns}
        return Fields(messages, self._answer(row, choices), response, columns)

    def finish(self, row: Row) -> None:
        """Check the data set after its last row.

        Raises:
            DataError: a column that individual rows may lack was in no row at all.
        """
        for column, key in self._unseen.items():
            held = ", ".join(map(str, row.columns))
            raise DataError(f"{self._source} has no column '{column}' (it has: {held}): set {key}")

    def _optional(self, row: Row, column: str) -> Any:
        """The value of a column; None if this row lacks it."""
        value = row.get(column)
        if value is MISSING:
            return None
        self._unseen.pop(column, None)
        return value

    def _column(self, row: Row, column: str, key: str) -> Any:
        value = row.get(column)
        if value is MISSING:
            held = ", ".join(map(str, row.columns))
            raise DataError(f"{self._source} {row.where} has no column '{column}' (it has: {held}): set {key}")
        return value

    def _text(self, row: Row, column: str, key: str) -> str:
        return self._checked(row, column, self._column(row, column, key), key)

    def _checked(self, row: Row, column: str, value: Any, key: str) -> str:
        """The value as non-empty text that can be encoded as UTF-8."""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if not isinstance(value, str) or not value.strip():
            what = "empty" if value is None or isinstance(value, str) else f"{_shown(value)}, not text"
            raise DataError(f"{self._source} {row.where}: '{column}' is {what}: write it as a string, or set {key}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{self._source} {row.where}: '{column}' is not valid UTF-8 text: write it again") from error
        return value

    def _messages(self, row: Row) -> Messages:
        """The prompt as messages, the last of them the user's; plain text is a single message."""
        key = self._data.prompt_key
        value = self._column(row, key, "data.prompt_key")
        if not isinstance(value, list):
            return [{"role": "user", "content": self._text(row, key, "data.prompt_key")}]
        where = f"{self._source} {row.where}: '{key}'"
        if not value or not all(isinstance(each, dict) and each.get("role") in ROLES for each in value):
            raise DataError(f"{where} is {_shown(value)}, neither text nor messages with role and content: set data.prompt_key")
        messages = [{"role": each["role"], "content": self._content(row, each.get("content"))} for each in value]
        if messages[-1]["role"] != "user":
            raise DataError(f"{where} ends with a message of the {messages[-1]['role']}: it must end with the user's")
        if self._data.system_prompt is not None and messages[0]["role"] == "system":
            raise DataError(f"{where} already has a system message: leave out data.system_prompt")
        return messages

    def _content(self, row: Row, content: Any) -> str:
        """The text of a message, given as a string or in parts of type `text`."""
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text")) for part in content)
        return self._checked(row, f"{self._data.prompt_key}.content", content, "data.prompt_key")

    def _problem(self, row: Row, text: str, pattern: re.Pattern[str]) -> str:
        match = pattern.search(text)
        if match is None or not match[1].strip():
            raise DataError(f"{self._source} {row.where}: the prompt does not match data.prompt_pattern: {_shown(text)}")
        return match[1]

    def _choices(self, row: Row, key: str) -> list[_Choice]:
        """The choices, from a list of texts or an object with the lists `label` and `text`."""
        value = self._column(row, key, "data.choices_key")
        texts, labels = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
        written = [text if text == "" else answer_text(text) for text in texts] if isinstance(texts, list) else []
        labels = _LETTERS[: len(written)] if labels is None else labels
        if not 2 <= len(written) <= len(_LETTERS) or None in written or len(labels) != len(written):
            raise DataError(
                f"{self._source} {row.where}: '{key}' is {_shown(value)}, not a list of choices: set data.choices_key"
            )
        return [_Choice(*each) for each in zip(_LETTERS, map(str, labels), map(str, written), strict=False)]

    def _answer(self, row: Row, choices: Sequence[_Choice] | None) -> str:
        key = self._data.answer_key
        value = self._column(row, key, "data.answer_key") if self._needs_answers else row.get(key)
        if not self._needs_answers and (value is MISSING or value is None):
            return ""
        if isinstance(value, bytes):
            value = self._text(row, key, "data.answer_key")
        if choices is not None:
            return self._chosen(row, value, choices)
        text = answer_text(value)
        return self._checked(row, key, value if text is None else text, "data.answer_key")

    def _chosen(self, row: Row, value: Any, choices: Sequence[_Choice]) -> str:
        """The letter of the choice that the answer names by its number from 0, its label or its text."""
        if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps is one of floats
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
            return choices[value].letter
        if isinstance(value, str):
            label = chosen(value) if all(choice.label == choice.letter for choice in choices) else value.strip()
            named = [choice.letter for choice in choices if choice.label.strip() in (label, value.strip())]
            meant = [choice.letter for choice in choices if choice.text.strip() == value.strip()]
            found = {*named, *meant}
            if len(found) == 1:
                return found.pop()
            if found:
                raise DataError(
                    f"{self._source} {row.where}: '{self._data.answer_key}' is {_shown(value)}, which could mean each of the "
                    f"choices {', '.join(sorted(found))}: write the number of the choice from 0"
                )
        raise DataError(
            f"{self._source} {row.where}: '{self._data.answer_key}' is {_shown(value)}, none of the {len(choices)} choices: "
            "write its number from 0, its letter or its text"
        )


def conversation(messages: Messages) -> str:
    """The problem without the template: the user's messages, each on a new line."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def as_json(columns: dict[str, Any]) -> str:
    """Columns as JSON; values that JSON cannot represent (dates, decimals) become text."""
    return json.dumps(columns, default=str)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"data.prompt_pattern={pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ConfigError(f"data.prompt_pattern={pattern!r} needs exactly one group (...), which matches the problem")
    return compiled


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
