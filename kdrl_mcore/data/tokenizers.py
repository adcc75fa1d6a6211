"""Tokenizers, loaded so that they agree with their `tokenizer.json`, and the check that student and teacher share one.

transformers may rebuild a tokenizer by its model type instead of reading `tokenizer.json`, and can then silently drop
characters or produce other ids than the model was trained with. So every tokenizer is compared with the file before it is
used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdrl_mcore.errors import DataError
from kdrl_mcore.types import TokenIds

PROBE = (
    "Solve 3x + 14 = 2,025.75 for x.\n\n  Step 1:\tsubtract 14\r\n"
    "\\[ x = \\frac{2011.75}{3} \\approx 670.58\\overline{3}, \\quad \\{x \\in \\mathbb{R} : x^2 \\le 10^{6}\\} \\]\n"
    "1+2=3\n12345678901234567890 naïve café \u2013 “quoted” 数学 π≈3.14159 \\boxed{25}   \n"
)
"""Newlines, runs of spaces, digits, LaTeX and characters outside ASCII, on which different tokenizers tend to disagree."""


class Tokenizer:
    """A tokenizer that agrees with its `tokenizer.json`.

    Attributes:
        path: the model directory.
        eos_ids: the ids that end a response: the tokenizer's own end of sequence, those of `generation_config.json`, and the
            token that ends a turn in the chat template.
        eos_id: the tokenizer's own end of sequence, with which supervised targets end under the plain template.
        turn_end_id: the token with which the chat template ends an assistant's turn; None without a template or such a token.
        bos_id: the beginning of sequence, if there is one.
        tokens: the token of each id.
        added_ids: the ids of added tokens, such as those that begin and end turns.
        vocab_size: the largest token id, added tokens included, plus 1. The model may have more columns (padding).
        has_chat_template: whether `chat_text` can be used.
    """

    def __init__(self, path: Path, backend: Any) -> None:
        """Wrap a loaded transformers tokenizer; use `load_tokenizer` to make one.

        Raises:
            DataError: no end of sequence is defined anywhere.
        """
        self._backend = backend
        self.path = path
        self.turn_end_id = _turn_end(backend)
        self.bos_id: int | None = backend.bos_token_id
        eos_ids = eos_token_ids(path, backend.eos_token_id)
        self.eos_id: int = backend.eos_token_id if backend.eos_token_id is not None else min(eos_ids)
        self.eos_ids = eos_ids if self.turn_end_id is None else eos_ids | {self.turn_end_id}
        self.tokens: dict[int, str] = {index: token for token, index in backend.get_vocab().items()}
        self.added_ids = frozenset(backend.get_added_vocab().values())
        self.vocab_size = max(self.tokens) + 1
        self.has_chat_template = bool(backend.chat_template)
        self._num_appended = _num_appended(backend)

    @property
    def fast(self) -> tokenizers.Tokenizer:
        """The tokenizer of the `tokenizers` library, for texts that are decoded token by token."""
        return self._backend.backend_tokenizer

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[TokenIds]:
        """Token ids of each text; with `special_tokens`, including those that the tokenizer adds, such as a beginning of
        sequence."""
        if not texts:
            return []
        rows = self._backend(list(texts), add_special_tokens=special_tokens)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in rows]

    def encode_prompts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of plain prompts with the special tokens that the tokenizer puts before a text. Those that it puts after
        one, such as an end of sequence (`add_eos_token`), are left out, because the response follows. A text that already
        begins with the beginning of sequence, as rendered chats do, gets no second one."""
        rows = self.encode(texts, special_tokens=True)
        rows = [row[: len(row) - self._num_appended] for row in rows]
        return [row[1:] if self.bos_id is not None and (row[:2] == self.bos_id).sum() == 2 else row for row in rows]

    def show(self, token_ids: Sequence[int] | TokenIds) -> str:
        """The text of these ids on one line, special tokens included; unprintable characters are escaped as in Python."""
        return repr(self._backend.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text_of(self, token_id: int) -> str:
        """The text of one token; empty where it is not a whole character by itself."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return "" if "\N{REPLACEMENT CHARACTER}" in text else text

    def template_asks_for(self, name: str) -> bool:
        """Whether this word occurs in the chat template."""
        return re.search(rf"\b{re.escape(name)}\b", str(self._backend.chat_template or "")) is not None

    def chat_text(
        self, messages: list[dict[str, str]], today: datetime, arguments: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """The conversation in the chat template, up to where the assistant's turn begins, special tokens included.

        Args:
            today: the date for templates that ask for it, as Llama 3's does: with the real date, the same problems would give
                different prompts tomorrow.
            arguments: what else the template asks for, such as `enable_thinking`.

        Raises:
            DataError: the template rejects the conversation (for instance because of a system prompt).
        """
        try:
            return self._backend.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=today.strftime, **arguments
            )
        except Exception as error:  # a template is a program and can raise anything
            raise DataError(
                f"the chat template of {self.path} rejects the prompt ({_one_line(error)}): set data.template=plain"
            ) from error

    def decode_response(self, token_ids: Sequence[int] | TokenIds) -> str:
        """The text of a response, without the end of sequence and other special tokens."""
        ids = [int(index) for index in token_ids]
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, from local files only and without running code from them.

    The tokenizer that transformers loads is compared with `tokenizer.json`: its vocabulary (some classes add tokens for which
    the model has no row), and, for `PROBE` and the added tokens, the ids and the text decoded from them. If they differ, the
    generic tokenizer that reads `tokenizer.json` (with the special tokens and the chat template of `tokenizer_config.json`)
    is compared in the same way and used instead.

    Raises:
        DataError: `tokenizer.json` is missing or unreadable, or neither tokenizer agrees with it; the message names the first
            differences.
    """
    directory = Path(path)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{file} does not exist: give a model directory with a fast tokenizer (save_pretrained writes one)")
    try:
        truth = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{file} is not a readable tokenizer ({_one_line(error)}): copy it from the original model again"
        ) from error
    truth.no_truncation()
    truth.no_padding()
    differences: list[str] = []
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            backend = loader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a model type that transformers does not know, or a setting that it rejects
            differences.append(f"{loader.__name__} cannot read it: {_one_line(error)}")
            continue
        difference = _first_difference(backend, truth)
        if difference is None:
            return Tokenizer(directory, backend)
        differences.append(f"{type(backend).__name__} {difference}")
    raise DataError(
        f"the tokenizer of {directory} cannot be loaded so that it agrees with {file.name}: {'; '.join(differences)}"
    )


def eos_token_ids(path: str | Path, tokenizer_eos: int | None) -> frozenset[int]:
    """The ids that end a response: the tokenizer's, and `eos_token_id` of `generation_config.json` (one id or a list).

    Raises:
        DataError: there is no such id, or `generation_config.json` is not a JSON object with token ids.
    """
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        try:
            listed: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{file} is not a JSON object: copy it from the original model again") from error
        added = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(each) is int and each >= 0 for each in added):
            raise DataError(
                f"{file}: eos_token_id is {listed!r}, not a token id or a list of them: copy it from the original model again"
            )
        ids.update(added)
    if not ids:
        raise DataError(f"{path} defines no end of sequence: set eos_token in its tokenizer_config.json")
    return frozenset(ids)


def _num_appended(backend: Any) -> int:
    """The number of special tokens that the tokenizer puts after a text."""
    bare, whole = (backend("1", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(bare), -1, -1)
    return next((len(whole) - len(bare) - start for start in starts if whole[start : start + len(bare)] == bare), 0)


def _turn_end(backend: Any) -> int | None:
    """The token that the chat template writes after an assistant's message, if it is an added token. It often differs from the
    tokenizer's own end of sequence, which may be the base model's."""
    if not backend.chat_template:
        return None
    answer = "1984"
    try:
        text = backend.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], tokenize=False
        )
    except Exception:  # a template is a program and can raise anything; `chat_text` reports the conversations that it rejects
        return None
    rest = text.rpartition(answer)[2].lstrip()
    ids = backend(rest, add_special_tokens=False)["input_ids"] if rest else []
    return ids[0] if ids and ids[0] in backend.get_added_vocab().values() else None


def different_added_tokens(student: Tokenizer, teacher: Tokenizer) -> frozenset[int]:
    """The ids, of those that both vocabularies have, at which the two have different added tokens (or only one has any)."""
    ids = (student.added_ids | teacher.added_ids) & set(range(min(student.vocab_size, teacher.vocab_size)))
    return frozenset(
        index
        for index in ids
        if student.tokens.get(index) != teacher.tokens.get(index)
        and all(index in side.added_ids or index not in side.tokens for side in (student, teacher))
    )


def check_same_tokenizer(student: Tokenizer, teacher: Tokenizer, but: Collection[int] = ()) -> int:
    """Check that both tokenizers have the same token at every shared id, and return the number of ids that they share.

    The shared ids are those below the size of the smaller vocabulary: there, a token that differs or that only one tokenizer
    has is an error. Tokens that only the larger vocabulary has above them are allowed, as their columns are left out of both
    softmaxes; but the student must be able to end its responses without them. Both tokenizers must also split `PROBE` into
    the same tokens, or the teacher would score text in a form that it has never seen.

    Args:
        but: ids at which the tokens may differ.

    Raises:
        DataError: the tokenizers differ; the message names the first difference.
    """
    shared = min(student.vocab_size, teacher.vocab_size)
    advice = "distillation compares token by token: use a teacher of the student's model family"
    for index in range(shared):
        mine, other = student.tokens.get(index), teacher.tokens.get(index)
        if mine != other and index not in but:
            names = [f"{side.path} has {_name(token)}" for side, token in ((student, mine), (teacher, other))]
            raise DataError(f"student and teacher have different tokenizers: at id {index}, {' and '.join(names)}; {advice}")
    if min(student.eos_ids) >= shared:
        end = min(student.eos_ids)
        raise DataError(
            f"the student ends with token {end} ({_name(student.tokens.get(end))}), which the teacher lacks; {advice}"
        )
    encoded = [side.encode([PROBE], special_tokens=False)[0].tolist() for side in (student, teacher)]
    first = _first_mismatch(*encoded)
    if first is not None:
        mine, other = (
            _name(side.tokens.get(ids[first]) if first < len(ids) else None)
            for side, ids in zip((student, teacher), encoded, strict=True)
        )
        raise DataError(
            f"student and teacher tokenize the same text differently: token {first} is {mine} and {other}; {advice}"
        )
    return shared


def _first_difference(backend: Any, truth: tokenizers.Tokenizer) -> str | None:
    """How a transformers tokenizer differs from `tokenizer.json`, in its vocabulary or on a text; None if it does not."""
    vocabulary, true_vocabulary = backend.get_vocab(), truth.get_vocab(with_added_tokens=True)
    if vocabulary != true_vocabulary:
        index = min(index for _, index in vocabulary.items() ^ true_vocabulary.items())
        return f"has {_name(backend.convert_ids_to_tokens(index))} instead of {_name(truth.id_to_token(index))} at id {index}"
    added = [token.content for _, token in sorted(truth.get_added_tokens_decoder().items())]
    for text in (PROBE, *(f"{token} user\n{token}" for token in added)):
        ids, true_ids = backend.encode(text, add_special_tokens=False), truth.encode(text, add_special_tokens=False).ids
        index = _first_mismatch(ids, true_ids)
        if index is not None:
            got, expected = ((truth.id_to_token(row[index]) if index < len(row) else None) for row in (ids, true_ids))
            return f"splits {text[:20]!r}... differently: token {index} is {_name(got)} instead of {_name(expected)}"
        decoded = backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        true_text = truth.decode(true_ids, skip_special_tokens=False)
        index = _first_mismatch(decoded, true_text)
        if index is not None:
            return f"decodes to different text: {decoded[index : index + 20]!r} instead of {true_text[index : index + 20]!r}"
    return None


def _first_mismatch(left: Sequence[object], right: Sequence[object]) -> int | None:
    """The first index at which two sequences differ, or at which the shorter one ends; None if they are equal."""
    if left == right:
        return None
    pairs: Iterable[tuple[object, object]] = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
