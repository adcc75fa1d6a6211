"""Tokenizers, loaded so that they agree with their `tokenizer.json`, and the check that student and teacher share one.

transformers may rebuild a tokenizer by its model type instead of reading `tokenizer.json`, and can then silently drop
characters or give other ids than the model was trained with. So nothing is used before it was compared with the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
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
"""Newlines, runs of spaces, digits, LaTeX and characters outside ASCII: what tokenizers that differ treat differently."""


class Tokenizer:
    """A tokenizer that agrees with its `tokenizer.json`.

    Attributes:
        path: the model directory.
        eos_ids: the ids that end a response: the tokenizer's own end of sequence and those of `generation_config.json`.
        eos_id: the tokenizer's own end of sequence, which supervised targets end with.
        vocabulary_size: the largest token id, added tokens included, plus 1. The model may have more columns (padding).
        has_chat_template: whether `encode_chat` can be used.
    """

    def __init__(self, path: Path, backend: Any) -> None:
        """Wrap a loaded transformers tokenizer; `load_tokenizer` is what makes one.

        Raises:
            DataError: no end of sequence is defined anywhere.
        """
        self._backend = backend
        self.path = path
        self.eos_ids = eos_token_ids(path, backend.eos_token_id)
        self.eos_id: int = backend.eos_token_id if backend.eos_token_id is not None else min(self.eos_ids)
        self.tokens: dict[int, str] = {index: token for token, index in backend.get_vocab().items()}
        self.vocabulary_size = max(self.tokens) + 1
        self.has_chat_template = bool(backend.chat_template)

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[TokenIds]:
        """Token ids of each text; `special_tokens` adds what the tokenizer puts around one, such as a beginning of sequence."""
        if not texts:
            return []
        rows = self._backend(list(texts), add_special_tokens=special_tokens)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in rows]

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """The conversation by the chat template, up to where the assistant begins. It already holds its special tokens.

        Raises:
            DataError: the template refuses the conversation (for instance a system prompt).
        """
        try:
            return self._backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it raises what it likes
            raise DataError(
                f"the chat template of {self.path} refuses the prompt ({_one_line(error)}): set data.template=plain"
            ) from error

    def decode_response(self, token_ids: Sequence[int] | TokenIds) -> str:
        """The text of a response, without the end of sequence and other special tokens."""
        ids = [int(index) for index in token_ids]
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, from local files only and without running code from them.

    What transformers makes of the directory is compared with `tokenizer.json`: the vocabulary (some classes add tokens of
    their own, which the model has no row for), and on `PROBE` and the added tokens the ids and the text decoded from them.
    If they differ, the generic tokenizer that reads `tokenizer.json` (with the special tokens and the chat template of
    `tokenizer_config.json`) is compared and taken instead.

    Raises:
        DataError: `tokenizer.json` is missing or unreadable, or no way to load it agrees with it (naming the first difference).
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
        except Exception as error:  # a model type that transformers does not know, a setting that it refuses
            differences.append(f"{loader.__name__} cannot read it: {_one_line(error)}")
            continue
        difference = _first_difference(backend, truth)
        if difference is None:
            return Tokenizer(directory, backend)
        differences.append(f"{type(backend).__name__} {difference}")
    raise DataError(f"the tokenizer of {directory} cannot be loaded as {file.name} has it: {'; '.join(differences)}")


def eos_token_ids(path: str | Path, tokenizer_eos: int | None) -> frozenset[int]:
    """The ids that end a response: the tokenizer's, and `eos_token_id` of `generation_config.json` (one id or a list).

    Raises:
        DataError: there is none, or `generation_config.json` is not JSON.
    """
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        try:
            listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{file} is not a JSON object: copy it from the original model again") from error
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if not ids:
        raise DataError(f"{path} defines no end of sequence: set eos_token in its tokenizer_config.json")
    return frozenset(ids)


def check_same_tokenizer(student: Tokenizer, teacher: Tokenizer) -> int:
    """Check that both tokenizers give every shared id the same token, and return how many ids they share.

    Shared are the ids below the smaller of both vocabularies: there, one token that differs, or that only one of them has,
    is an error. Tokens that only the larger vocabulary adds behind them are not, as their columns are left out of both
    softmaxes; but the student must be able to end its responses without them. Both must also cut `PROBE` into the same
    tokens, or the teacher would score text in a form it has never seen.

    Raises:
        DataError: naming the first difference.
    """
    shared = min(student.vocabulary_size, teacher.vocabulary_size)
    advice = "distillation compares token by token: use a teacher of the student's model family"
    for index in range(shared):
        mine, other = student.tokens.get(index), teacher.tokens.get(index)
        if mine != other:
            names = [f"{side.path} has {_name(token)}" for side, token in ((student, mine), (teacher, other))]
            raise DataError(f"student and teacher have different tokenizers: at id {index}, {' and '.join(names)}; {advice}")
    if min(student.eos_ids) >= shared:
        index = min(student.eos_ids)
        raise DataError(
            f"the student ends with token {index} ({_name(student.tokens.get(index))}), which the teacher lacks; {advice}"
        )
    pieces = [side.encode([PROBE], special_tokens=False)[0].tolist() for side in (student, teacher)]
    place = _first_mismatch(*pieces)
    if place is not None:
        cut = [
            _name(side.tokens.get(ids[place]) if place < len(ids) else None)
            for side, ids in zip((student, teacher), pieces, strict=True)
        ]
        raise DataError(f"student and teacher cut the same text differently: token {place} is {cut[0]} and {cut[1]}; {advice}")
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
        place = _first_mismatch(ids, true_ids)
        if place is not None:
            got, expected = ((truth.id_to_token(row[place]) if place < len(row) else None) for row in (ids, true_ids))
            return f"cuts {text[:20]!r}... differently: token {place} is {_name(got)} instead of {_name(expected)}"
        decoded = backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        true_text = truth.decode(true_ids, skip_special_tokens=False)
        place = _first_mismatch(decoded, true_text)
        if place is not None:
            return f"decodes to other text: {decoded[place : place + 20]!r} instead of {true_text[place : place + 20]!r}"
    return None


def _first_mismatch(left: Sequence[object], right: Sequence[object]) -> int | None:
    """The first index at which two sequences differ (also where one is at its end); None if they are equal."""
    if left == right:
        return None
    pairs: Iterable[tuple[object, object]] = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
