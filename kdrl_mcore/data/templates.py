"""From a conversation to the text that a model reads: the chat template of a tokenizer, or a plain template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml

from kdrl_mcore.config import DataConfig, TeacherPromptConfig
from kdrl_mcore.data.columns import Fields, Messages
from kdrl_mcore.data.rows import Row
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import ConfigError, DataError

_FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")


class Template:
    """The template of one model for the prompts of one data set."""

    def __init__(
        self,
        source: str,
        settings: DataConfig | TeacherPromptConfig,
        tokenizer: Tokenizer,
        *,
        section: str = "data",
        chat_date: str,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Args:
            source: the data set's name, for error messages.
            section: the section of these settings in the configuration, likewise.
            chat_date: see `data.chat_date`.
            columns: the columns that the texts may contain in addition to {prompt} and {answer}; None: only {prompt}.

        Raises:
            ConfigError: a text has no {prompt} or names something that is not a column, or a setting belongs to the other kind
                of template.
            DataError: the tokenizer has no chat template.
        """
        self._source, self._section, self._settings, self._tokenizer = source, section, settings, tokenizer
        self.is_plain = settings.template == "plain"
        self._today = _date(chat_date)
        self._fields = None if columns is None else ("prompt", "answer", *columns)
        if self.is_plain:
            for name in ("system_prompt", "template_arguments"):
                if getattr(settings, name):
                    raise ConfigError(
                        f"{section}.{name} needs {section}.template=chat: for plain, write all of it into "
                        f"{section}.plain_template"
                    )
        elif not tokenizer.has_chat_template:
            raise DataError(f"{tokenizer.path} has no chat template, which {source} needs: set {section}.template=plain")
        key = "plain_template" if self.is_plain else "message_template"
        self._text: str = getattr(settings, key)
        self._arguments = _arguments(settings.template_arguments, f"{section}.template_arguments", tokenizer)
        if "{prompt}" not in self._text:
            raise ConfigError(f"{section}.{key}={self._text!r} lacks {{prompt}}, which stands for the prompt: add it")
        for name, text in ((key, self._text), ("system_prompt", settings.system_prompt or "")):
            self._check_fields(f"{section}.{name}", text)

    def fill(self, row: Row, fields: Fields) -> str:
        """The text of a row's prompt, up to where the response begins.

        Raises:
            DataError: the conversation does not fit the template.
        """
        *before, last = fields.messages
        values = {"prompt": last["content"], "answer": fields.answer, **fields.columns}
        text = self._put_in(self._text, values)
        if self.is_plain:
            if before:
                raise DataError(
                    f"{self._source} {row.where}: the prompt has {len(fields.messages)} messages, but "
                    f"{self._section}.template=plain takes only one: set {self._section}.template=chat"
                )
            return text
        messages: Messages = [*before, {"role": last["role"], "content": text}]
        if self._settings.system_prompt is not None:
            if messages[0]["role"] == "system":
                messages = messages[1:]  # only a teacher's: `FieldReader` refuses two for the student
            messages = [{"role": "system", "content": self._put_in(self._settings.system_prompt, values)}, *messages]
        return self._tokenizer.chat_text(messages, self._today, self._arguments)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """The token ids of such texts."""
        if self.is_plain:
            return self._tokenizer.encode_prompts(texts)
        return self._tokenizer.encode(texts, special_tokens=False)

    def _put_in(self, text: str, values: Mapping[str, Any]) -> str:
        if self._fields is None:
            return text.replace("{prompt}", values["prompt"])
        return _FIELD.sub(lambda found: _as_text(values[found[1]]), text)

    def _check_fields(self, key: str, text: str) -> None:
        for name in _FIELD.findall(text) if self._fields is not None else ():
            if name not in (self._fields or ()):
                raise ConfigError(
                    f"{key}: {{{name}}} is none of {', '.join(self._fields or ())}: name its column in data.columns, or write "
                    "it without braces"
                )


def _as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _arguments(texts: Sequence[str], key: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """NAME=VALUE, the value in YAML, as arguments of the chat template.

    Raises:
        ConfigError: one is not of this form, or the template does not ask for it.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{key}: '{text}' is not NAME=VALUE, such as enable_thinking=false")
        if not tokenizer.template_asks_for(name):
            raise ConfigError(f"{key}: the chat template of {tokenizer.path} does not ask for {name}: leave it out")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: the value of '{text}' is not YAML: put quotes around a text") from error
    return arguments


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(f"data.chat_date={text} is not a date: write it as 2024-07-26") from error
