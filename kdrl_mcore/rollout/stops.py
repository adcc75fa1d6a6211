"""Stop strings: a response ends with the token that completes one of them in its text. Both engines find them with these
classes, also in responses that are sampled in parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

_RESTARTS = "Invalid prefix encountered"
"""How the error of a stream begins that cannot continue after bytes that are no UTF-8 (random models sample such)."""


class StopStrings:
    """Stop strings in the texts of one tokenizer. Special tokens count with their own text."""

    def __init__(self, backend: tokenizers.Tokenizer, strings: Sequence[str]) -> None:
        """Args:
        strings: not empty, nor is any of them.
        """
        self._backend, self._strings = backend, tuple(strings)
        self._overlap = max(map(len, strings)) - 1

    def begin(self, token_ids: Iterable[int] = ()) -> ResponseText:
        """The text of one response.

        Args:
            token_ids: its tokens so far, if it is continued.
        """
        text = ResponseText(self._backend, self._strings, self._overlap)
        text.read(token_ids)
        return text


class ResponseText:
    """The text of one response, token by token."""

    def __init__(self, backend: tokenizers.Tokenizer, strings: Sequence[str], overlap: int) -> None:
        self._backend, self._strings, self._overlap = backend, strings, overlap
        self._stream = DecodeStream(skip_special_tokens=False)
        self._end = ""  # of the text so far: a stop string may begin in it

    def read(self, token_ids: Iterable[int]) -> int | None:
        """Read further tokens. Returns the number of these up to and including the one that completes a stop string, or None.
        Those after it are not read."""
        for count, token_id in enumerate(token_ids, start=1):
            text = self._end + self._next(int(token_id))
            if any(string in text for string in self._strings):
                return count
            self._end = text[max(0, len(text) - self._overlap) :]
        return None

    def _next(self, token_id: int) -> str:
        """The text that a token adds; empty if its bytes do not complete a character."""
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception as error:  # the library raises plain Exception
            if not str(error).startswith(_RESTARTS):
                raise
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._backend, token_id) or ""


class StopsOfBatch:
    """The stop strings of responses that are sampled together, of which further tokens are known from time to time.

    Attributes:
        ends: for the responses that completed one, the number of their new tokens up to and including the one that did.
    """

    def __init__(self, texts: Sequence[ResponseText], limits: Sequence[int], end_ids: Collection[int]) -> None:
        """Args:
        texts: of the responses so far.
        limits: the most new tokens of each response.
        end_ids: tokens that end a response.
        """
        self._texts, self._limits, self._end_ids = texts, limits, end_ids
        self._known = [0] * len(texts)  # new tokens read of each response
        self.ends: dict[int, int] = {}

    def read(self, responses: Sequence[int], new_NK: NDArray[np.int64]) -> list[bool]:
        """Read further tokens of some responses, for each the next K; those after its end are not read. Returns whether each
        response has completed a stop string."""
        for response, row in zip(responses, new_NK.tolist(), strict=True):
            known = self._known[response]
            if response in self.ends or known >= self._limits[response]:
                continue
            new = row[: self._limits[response] - known]
            last = next((place for place, token_id in enumerate(new) if token_id in self._end_ids), None)
            if last is not None:
                new = new[: last + 1]
            count = self._texts[response].read(new)
            if count is not None:
                self.ends[response] = known + count
            self._known[response] = self._limits[response] if last is not None else known + len(new)
        return [response in self.ends for response in responses]
