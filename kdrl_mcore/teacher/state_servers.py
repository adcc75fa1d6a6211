"""A client of the servers that return hidden states (`state_server.py`).

The student multiplies the states with the teacher's output head, so everything is known that a teacher in the job can give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from kdrl_mcore.config.derived import DISTRIBUTION, LOG_PROBS
from kdrl_mcore.errors import TeacherError
from kdrl_mcore.teacher.servers import (
    Addresses,
    Expected,
    Failed,
    ScoringServers,
    ServedScores,
    check_fingerprint,
    check_texts,
    json_of,
)
from kdrl_mcore.teacher.state_server import write_request
from kdrl_mcore.types import Rollout


class StateServers(ScoringServers):
    """Servers of one teacher that return hidden states."""

    def __init__(
        self, addresses: Addresses, *, temperature: float, columns: int, hidden_size: int | None, **settings: Any
    ) -> None:
        """Args:
        temperature: that of log-probs and entropies.
        columns: the vocabulary columns that count in them.
        hidden_size: that of the teacher's output head; None where the student does not hold it.
        settings: those of `ScoringServers`.
        """
        super().__init__(addresses, **settings)
        self._temperature, self._columns, self._hidden_size = temperature, columns, hidden_size

    def check(self, expected: Expected) -> str:
        """See `ScoringServers`."""
        fingerprints = set[str]()
        for server in self._tokens:
            info = self._get(server, "/info")
            try:
                found, hidden_size = info["fingerprint"], info["hidden_size"]
                columns, positions = int(info["columns"]), int(info["positions"])
            except (KeyError, TypeError) as error:
                raise TeacherError(
                    f"the teacher's server {server} is not one of kdrl-serve-teacher --kind hidden_states"
                ) from error
            check_fingerprint(server, found, expected.fingerprint)
            fingerprints.add(str(found))
            if len(fingerprints) > 1:
                raise TeacherError(f"the teacher's servers {', '.join(self._tokens)} do not serve the same model")
            if self._hidden_size not in (None, hidden_size):
                raise TeacherError(
                    f"the teacher's server {server} has hidden states of {hidden_size} numbers, and the output head of the "
                    f"teacher's path needs {self._hidden_size}: serve the same model"
                )
            if columns != self._columns:
                raise TeacherError(
                    f"the teacher's server {server} counts {columns} vocabulary columns, and the run {self._columns}: start it "
                    f"with --vocabulary {self._columns}"
                )
            if expected.longest > positions:
                raise TeacherError(
                    f"the teacher's server {server} reads at most {positions} tokens, and prompt and response may have "
                    f"{expected.longest}: raise its --max-model-len, or lower rollout.max_prompt_tokens"
                )
            texts = self._texts(server, expected)
            check_texts(server, expected, texts)
        return f"fingerprint {next(iter(fingerprints))[:16]}"

    def _texts(self, server: str, expected: Expected) -> list[str]:
        try:
            texts = json_of(server, self._call(server, "POST", "/texts", json=expected.probe.tolist()))
        except Failed as error:
            raise TeacherError(f"the teacher's server {error}") from error
        return [str(text) for text in texts]

    def _scores(self, server: str, batch: Sequence[Rollout], wanted: frozenset[str]) -> list[ServedScores]:
        settings = {"temperature": repr(self._temperature), "wanted": ",".join(sorted(wanted))}
        answer = self._call(server, "POST", "/score", params=settings, content=write_request(list(batch)))
        lengths = [len(each.response_token_ids) for each in batch]
        try:
            found = {name: values.split(lengths) for name, values in safetensors.torch.load(answer.content).items()}
        except (SafetensorError, RuntimeError) as error:
            raise Failed(f"{server}: an answer of another form") from error
        names = [name for name, is_wanted in (("log_probs", LOG_PROBS), ("states", DISTRIBUTION)) if is_wanted in wanted]
        if not all(name in found for name in names):
            raise Failed(f"{server}: an answer without {', '.join(name for name in names if name not in found)}")
        nothing = [None] * len(batch)
        return [
            ServedScores(
                None if log_probs is None else log_probs.numpy(), states, None if entropies is None else entropies.numpy()
            )
            for log_probs, states, entropies in zip(
                *(found.get(name, nothing) for name in ("log_probs", "states", "entropies")), strict=True
            )
        ]
