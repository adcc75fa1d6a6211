"""A client of servers that score token ids through vLLM's completions interface (`prompt_logprobs`).

The log-probs are those of the server's softmax at temperature 1, over all columns of its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdrl_mcore.errors import TeacherError
from kdrl_mcore.teacher.head import pack_top_k
from kdrl_mcore.teacher.servers import (
    FINGERPRINT,
    Addresses,
    Expected,
    Failed,
    ScoringServers,
    ServedScores,
    check_fingerprint,
    check_texts,
    json_of,
)
from kdrl_mcore.types import Rollout, TokenFloats, TokenIds

IMPOSSIBLE = -9000.0
"""vLLM sends -9999 for a log-prob of minus infinity."""
SAME_MODEL = 0.5
"""Servers of one model differ by less than this in their log-probs of the probe, in the mean: more than rounding and
quantisation, and less than two models differ in the log-probs of random tokens."""


class CompletionServers(ScoringServers):
    """Servers of the same model through vLLM's completions interface."""

    def __init__(self, addresses: Addresses, *, model: str | None = None, top_k: int = 0, **settings: Any) -> None:
        """Args:
        model: the name of the model on the servers; None: the only one.
        top_k: the most likely tokens to ask for; 0: only the sampled token's log-prob.
        settings: those of `ScoringServers`.
        """
        super().__init__(addresses, **settings)
        self._model, self._top_k = model, top_k

    def check(self, expected: Expected) -> str:
        """See `ScoringServers`."""
        first: TokenFloats | None = None
        described = ""
        for server in self._tokens:
            served = self._served(server)
            aliases = [name for name in served if name.startswith(FINGERPRINT)]
            names = [name for name in served if name not in aliases]
            model = self._model or next(iter(names), "")
            if model not in names or (self._model is None and len(names) > 1):
                raise TeacherError(
                    f"the teacher's server {server} serves {', '.join(names) or 'no model'}: name one of them (server.model)"
                )
            self._model = model
            found = aliases[0].removeprefix(FINGERPRINT) if aliases else None
            check_fingerprint(server, found, expected.fingerprint)
            limit = served[model]
            if limit is not None and expected.longest >= limit:
                raise TeacherError(
                    f"the teacher's server {server} reads at most {limit} tokens, and prompt and response may have "
                    f"{expected.longest}, to which it adds one: raise its --max-model-len, or lower rollout.max_prompt_tokens"
                )
            scores = self._probe(server, expected, len(expected.probe) if limit is None else limit - 1)
            common = len(scores) if first is None else min(len(scores), len(first))
            difference = 0.0 if first is None else float(np.abs(scores[:common] - first[:common]).mean())
            if difference > SAME_MODEL:
                raise TeacherError(
                    f"the teacher's servers {next(iter(self._tokens))} and {server} do not serve the same model: their "
                    f"log-probs of the same tokens differ by {difference:.2g} in the mean"
                )
            first = scores
            described = model if found is None else f"{model} (fingerprint {found})"
        return described

    def _probe(self, server: str, expected: Expected, most: int) -> TokenFloats:
        """The log-probs of the probe's tokens but the first, whose texts are compared."""
        probe = expected.probe[:most]
        try:
            (entries,) = self._ask(server, [probe])
        except Failed as error:
            raise TeacherError(f"the teacher's server {error}") from error
        found = _parse(entries, 1, probe, self._top_k, f"{server}, probe")
        texts = [each[str(index)].get("decoded_token") for each, index in zip(entries[1:], probe[1:].tolist(), strict=True)]
        check_texts(server, expected, [None, *texts])
        return found[0]

    def _scores(self, server: str, batch: Sequence[Rollout], wanted: frozenset[str]) -> list[ServedScores]:
        sequences = [np.concatenate((each.prompt_token_ids, each.response_token_ids)) for each in batch]
        scores = []
        for each, ids, entries in zip(batch, sequences, self._ask(server, sequences), strict=True):
            where = f"{server}, prompt {each.prompt_id}"
            log_probs, top_ids, top = _parse(entries, len(each.prompt_token_ids), ids, self._top_k, where)
            states = pack_top_k(*map(torch.from_numpy, (log_probs, top, top_ids))) if self._top_k else None
            scores.append(ServedScores(log_probs, states))
        return scores

    def _served(self, server: str) -> dict[str, int | None]:
        found = self._get(server, "/v1/models")
        try:
            return {each["id"]: each.get("max_model_len") for each in found["data"]}
        except (KeyError, TypeError) as error:
            raise TeacherError(f"the teacher's server {server} lists no models at /v1/models: check its address") from error

    def _ask(self, server: str, sequences: Sequence[TokenIds]) -> list[Any]:
        """The `prompt_logprobs` of each sequence."""
        body = {
            "model": self._model,
            "prompt": [ids.tolist() for ids in sequences],
            "prompt_logprobs": self._top_k,
            "max_tokens": 1,
            "temperature": 1.0,
        }
        found = json_of(server, self._call(server, "POST", "/v1/completions", json=body))
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            lists = [choice["prompt_logprobs"] for choice in choices]
            assert [len(each) for each in lists] == [len(ids) for ids in sequences]
        except (KeyError, TypeError, AssertionError) as error:
            raise TeacherError(
                f"the teacher's server {server} did not return prompt_logprobs for every token: serve it with vLLM"
            ) from error
        return lists


def _parse(
    entries: Sequence[Any], start: int, ids: TokenIds, top_k: int, where: str
) -> tuple[TokenFloats, TokenIds, TokenFloats]:
    """Log T of the tokens from `start` on [T], the ids of the teacher's k most likely tokens there, and their log-probs [T, k].
    The sampled token is among the entries, with or without being in the top k."""
    tokens = len(ids) - start
    log_probs = np.empty(tokens, np.float32)
    top_ids, top = np.empty((tokens, top_k), np.int64), np.empty((tokens, top_k), np.float32)
    for row in range(tokens):
        found = {int(index): float(entry["logprob"]) for index, entry in (entries[start + row] or {}).items()}
        sampled = found.get(int(ids[start + row]), -np.inf)
        if not IMPOSSIBLE < sampled <= 1e-3 or len(found) < top_k:
            raise TeacherError(
                f"the teacher's server {where}: no usable scores of token {row} (id {ids[start + row]}, {len(found)} tokens): "
                "check that it has the student's tokens"
            )
        log_probs[row] = sampled
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        top_ids[row], top[row] = [index for index, _ in best], [value for _, value in best]
    return log_probs, top_ids, top
