"""Scores that were computed beforehand (arXiv 2604.13010): a file of `kdrl-score --teacher`, and training without the teacher.

A frozen teacher's scores do not age. They depend on the model, the temperature, the vocabulary and the tokens before the
response, which the file records for each response (`RECORD`); scores with a different record are refused. The rollouts do age,
which `check_age` bounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import ENTROPIES, TEACHER, reads_own_prompt, wanted_scores
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.errors import DataError, NumericalError
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.rollout.files import read_scored
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.types import Rollout, TokenFloats, TokenIds

RECORD = "teacher_scores"
"""The key of the `Record` of a response's scores in a rollout file."""
LISTS = {"log_probs": "teacher_log_probs", "entropies": "teacher_entropy"}
"""The keys of the scores themselves."""


@dataclass(frozen=True)
class Record:
    """How the scores of a response were computed.

    Attributes:
        model: the fingerprint of the teacher's weights and tokenizer.
        temperature: the temperature by which the logits were divided.
        columns: the number of vocabulary columns in the softmax.
        read: the fingerprint of the tokens before the response.
    """

    model: str
    temperature: float
    columns: int
    read: str


def fingerprint_of_tokens(ids: TokenIds) -> str:
    """A short fingerprint of token ids."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


def records_of(rollouts: Sequence[Rollout], model: Path, temperature: float, columns: int) -> list[dict[str, Any]]:
    """The record of each rollout that this model scored, with its prompt before it."""
    digest = fingerprint(str(model))
    assert digest is not None
    return [asdict(Record(digest, temperature, columns, fingerprint_of_tokens(each.prompt_token_ids))) for each in rollouts]


class RecordedScores:
    """A teacher whose scores are those of the rollout file that is replayed."""

    chunks: Sequence[LanguageModel] = ()

    def __init__(self, scores: Sequence[Mapping[str, TokenFloats]]) -> None:
        """Args:
        scores: for each line of the file, the lists that `LISTS` names.
        """
        self._scores = scores

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """See `ScoreSource`; a rollout's index is that of its line. No communication."""
        found = TeacherScores({index: len(each.response_token_ids) for index, each in rollouts.items()})
        for name, values in (("log_probs", found.log_probs), ("entropies", found.entropies)):
            if name in wanted:
                values.update({i: self._scores[i][LISTS[name]][: found.scored[i]] for i in rollouts})
        return found


def read_recorded(path: str | Path, config: Config, columns: int) -> RecordedScores:
    """The scores of a rollout file, every line of which must have been scored by this run's teacher.

    Args:
        columns: the number of vocabulary columns in this run's softmax.

    Raises:
        DataError: a line has no scores, or scores for another teacher, temperature, vocabulary or prompt.
    """
    own, teacher = reads_own_prompt(config), config.teacher.path
    expected = fingerprint(teacher)
    if teacher is not None and expected is None:
        raise DataError(f"teacher.path={teacher} does not exist: name the teacher of {path}, or leave it out")
    lists = ["log_probs", *(["entropies"] if ENTROPIES in wanted_scores(config.objective) else [])]
    scores = []
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    for number, (rollout, found) in enumerate(read_scored(path), start=1):
        where, record = f"{path} line {number}", _record(json.loads(lines[number - 1]).get(RECORD))
        missing = next((LISTS[name] for name in lists if LISTS[name] not in found), None if record else RECORD)
        if missing is not None:
            raise DataError(f"{where} has no '{missing}': score the file with kdrl-score --teacher MODEL")
        assert record is not None
        read = rollout.teacher_prompts.get(TEACHER) if own else rollout.prompt_token_ids
        expected = expected or record.model
        for what, theirs, ours in (
            ("teacher", record.model[:12], expected[:12]),
            ("temperature", record.temperature, config.rollout.temperature),
            ("number of vocabulary columns", record.columns, columns),
            ("prompt (teacher.prompt)", record.read, None if read is None else fingerprint_of_tokens(read)),
        ):
            if theirs != ours:
                raise DataError(
                    f"{where} has scores of another {what}: {theirs}, and this run's is {ours}: score the file again with "
                    "kdrl-score --teacher"
                )
        scores.append(found)
    return RecordedScores(scores)


def _record(value: Any) -> Record | None:
    if not isinstance(value, dict) or value.keys() != Record.__dataclass_fields__.keys():
        return None
    return Record(**value)


def check_age(config: Config, step: int, metrics: Mapping[str, float]) -> None:
    """Check that enough of the replayed rollouts still counts: the effective sample size of pi / mu, as a share of the tokens.

    Raises:
        NumericalError: it is below `teacher.min_ess`; on all ranks, because all have the same metrics.
    """
    share = metrics.get("rollout_ess", 1.0)
    if config.teacher.weights == "recorded" and share < config.teacher.min_ess:
        raise NumericalError(
            f"step {step}: the student has moved too far from the model that sampled its rollouts: the effective sample size "
            f"of pi/mu is {share:.3g} of the tokens, less than teacher.min_ess={config.teacher.min_ess:g}: sample and score "
            "new ones"
        )
