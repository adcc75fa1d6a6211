"""Rollout files: JSONL, one response per line. Every training step writes one, and `rollout=replay` trains on one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.errors import DataError
from kdrl_mcore.rollout import experts
from kdrl_mcore.types import ExpertIds, Rollout, TokenFloats

FINISH_REASONS: tuple[str, ...] = ("stop", "length")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "prompt_id": (str, int),
    "group_id": int,
    "prompt_token_ids": list,
    "response_token_ids": list,
    "sampler_log_probs": list,
    "reward": (int, float),
    "correct": bool,
    "finish_reason": str,
    "weight_version": int,
}
_TEXTS = ("prompt", "response", "answer", "domain")
_WORDS = {str: "text", int: "an integer", list: "a list", bool: "true or false", float: "a number"}


def write_rollouts(
    path: str | Path,
    rollouts: Sequence[Rollout],
    scores: Mapping[str, Sequence[TokenFloats]] | None = None,
    more: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Write a rollout file atomically: to a temporary file, then renamed.

    Each line holds the required keys, the texts `prompt`, `response` and `answer`, `teacher_log_probs` if the teacher scored
    the response, `domain` if training has several, `later_versions` if the weights changed during it, `teacher_prompts` if
    teachers read other prompts, `continuations` if the response was continued, `experts` if they were recorded, and the keys of
    `extra`.
    A float32 log-prob is written with enough digits to read the same float32 back. Log-probs that are not finite are written
    unchanged (`NaN`), for diagnosis; `read_rollouts` refuses them.

    Args:
        scores: further lists with one number per response token, by key, which make it a scored file.
        more: further values of each line, by key.

    Raises:
        DataError: a key of `extra` is one of the file's own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:  # writes lone surrogates as JSON escapes
            for index, rollout in enumerate(rollouts):
                row = to_row(rollout) | {key: values[index].tolist() for key, values in (scores or {}).items()}
                row |= {key: values[index] for key, values in (more or {}).items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_rollouts(path: str | Path) -> list[Rollout]:
    """Read a rollout file, and check every line.

    The texts may be missing. A further key with a number goes to `extra`; further keys with other values (such as the per-token
    lists of `kdrl-score`) are not part of a rollout and are ignored.

    Raises:
        DataError: the file is missing, empty or not UTF-8; or a line is cut off, is not JSON, lacks a key or holds a wrong
            value. The message names the file and the line.
    """
    return [rollout for rollout, _ in read_scored(path)]


def read_scored(path: str | Path) -> list[tuple[Rollout, dict[str, TokenFloats]]]:
    """Like `read_rollouts`, and for each line also its lists with one number per response token, by key (including
    `sampler_log_probs`)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a rollout file (JSONL), such as RUN/rollouts/step_000001.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): name a rollout file (JSONL)"
        ) from error
    ended = lines[-1] == ""
    if ended:
        lines.pop()
    rollouts = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            cut = number == len(lines) and not ended
            hint = (
                "is cut off: the file is incomplete, write it again" if cut else f"is not JSON ({error}): repair or remove it"
            )
            raise DataError(f"{path} line {number} {hint}") from error
        try:
            rollout = from_row(row)
            rollouts.append((rollout, _scores(row, len(rollout.response_token_ids))))
        except _BadRow as error:
            raise DataError(f"{path} line {number}: {error}") from error
    if not rollouts:
        raise DataError(f"{path} holds no rollouts")
    return rollouts


class _BadRow(Exception):
    """A line is wrong; the message says how."""


def to_row(rollout: Rollout) -> dict[str, Any]:
    """A rollout as one line of a rollout file; its float32 log-probs can be read back exactly."""
    row: dict[str, Any] = {
        "prompt_id": rollout.prompt_id,
        "group_id": rollout.group_id,
        "prompt_token_ids": rollout.prompt_token_ids.tolist(),
        "response_token_ids": rollout.response_token_ids.tolist(),
        "sampler_log_probs": rollout.sampler_log_probs.tolist(),
        "reward": float(rollout.reward),
        "correct": bool(rollout.correct),
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "prompt": rollout.prompt,
        "response": rollout.response,
        "answer": rollout.answer,
    }
    if rollout.teacher_log_probs is not None:
        row["teacher_log_probs"] = rollout.teacher_log_probs.tolist()
    if rollout.domain:
        row["domain"] = rollout.domain
    if rollout.later_versions:
        row["later_versions"] = [list(each) for each in rollout.later_versions]
    if rollout.teacher_prompts:
        row["teacher_prompts"] = {name: ids.tolist() for name, ids in rollout.teacher_prompts.items()}
    if rollout.continuations:
        row["continuations"] = rollout.continuations
    if rollout.experts is not None:
        row["experts"] = experts.encode(rollout.experts)
    taken = row.keys() & rollout.extra.keys()
    if taken:
        raise DataError(f"'{min(taken)}' is a key of rollout files and cannot be an extra key: rename it")
    return row | {key: float(value) for key, value in rollout.extra.items()}


def from_row(row: Any, finish_reasons: Sequence[str] = FINISH_REASONS) -> Rollout:
    """The rollout from the result of `to_row`, with one of these finish reasons."""
    if not isinstance(row, dict):
        raise _BadRow("is not a JSON object: write one response per line")
    for key, kind in _TYPES.items():
        if key not in row:
            raise _BadRow(f"'{key}' is missing; the required keys are {', '.join(_TYPES)}")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(row[key], kinds) or (isinstance(row[key], bool) and bool not in kinds):
            raise _BadRow(f"'{key}' is {_shorten(row[key])}, it must be {' or '.join(_WORDS[each] for each in kinds)}")
    for key in _TEXTS:
        if not isinstance(row.get(key, ""), str):
            raise _BadRow(f"'{key}' is {_shorten(row[key])}, it must be text")
    if row["finish_reason"] not in finish_reasons:
        raise _BadRow(f"'finish_reason' is {_shorten(row['finish_reason'])}, it must be one of {', '.join(finish_reasons)}")
    if type(row.get("continuations", 0)) is not int or row.get("continuations", 0) < 0:
        raise _BadRow(f"'continuations' is {_shorten(row['continuations'])}, it must be an integer from 0")
    if not _is_number(row["reward"]) or not math.isfinite(row["reward"]):
        raise _BadRow(f"'reward' is {_shorten(row['reward'])}, it must be finite")
    response = _token_ids(row, "response_token_ids")
    return Rollout(
        prompt_id=str(row["prompt_id"]),
        group_id=row["group_id"],
        prompt_token_ids=_token_ids(row, "prompt_token_ids"),
        response_token_ids=response,
        sampler_log_probs=_log_probs(row["sampler_log_probs"], len(response)),
        finish_reason=row["finish_reason"],
        weight_version=row["weight_version"],
        reward=float(row["reward"]),
        correct=row["correct"],
        **{key: row.get(key, "") for key in _TEXTS},
        later_versions=_later_versions(row, len(response)),
        teacher_prompts=_teacher_prompts(row),
        continuations=row.get("continuations", 0),
        experts=_experts(row),
        extra={
            key: float(value)
            for key, value in row.items()
            if key not in _TYPES and key != "continuations" and _is_number(value)
        },
    )


def _scores(row: dict[str, Any], num_tokens: int) -> dict[str, TokenFloats]:
    """Every list with one number per response token."""
    return {
        key: np.array(value, dtype=np.float32)
        for key, value in row.items()
        if key not in ("prompt_token_ids", "response_token_ids")
        and isinstance(value, list)
        and len(value) == num_tokens
        and all(map(_is_number, value))
    }


def _teacher_prompts(row: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
    """What teachers read instead of the prompt, by their names."""
    prompts = row.get("teacher_prompts", {})
    if not isinstance(prompts, dict) or not all(isinstance(ids, list) for ids in prompts.values()):
        raise _BadRow(f"'teacher_prompts' is {_shorten(prompts)}, it must hold a list of token ids for each teacher")
    return {name: _token_ids({f"teacher_prompts.{name}": ids}, f"teacher_prompts.{name}") for name, ids in prompts.items()}


def _experts(row: dict[str, Any]) -> ExpertIds | None:
    """The experts that the sampler chose."""
    if row.get("experts") is None:
        return None
    try:
        return experts.decode(row["experts"])
    except ValueError as error:
        raise _BadRow(f"'experts' is {_shorten(row['experts'])}: {error}") from error


def _later_versions(row: dict[str, Any], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """(version, tokens) of the weights that sampled the response's later tokens, if they changed during it."""
    value = row.get("later_versions", [])
    are_pairs = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(each) is int for each in pair) and pair[1] > 0 for pair in value
    )
    if not are_pairs or sum(count for _, count in value) >= num_tokens:
        raise _BadRow(
            f"'later_versions' is {_shorten(value)}, it must be a list of [version, tokens] of fewer tokens than the "
            f"response's {num_tokens}"
        )
    return tuple((version, count) for version, count in value)


def _token_ids(row: dict[str, Any], key: str) -> NDArray[np.int64]:
    if not row[key]:
        raise _BadRow(f"'{key}' is empty: it needs at least one token")
    if not all(type(value) is int and 0 <= value < 2**31 for value in row[key]):
        raise _BadRow(f"'{key}' must hold token ids, integers from 0")
    return np.array(row[key], dtype=np.int64)


def _log_probs(values: list[Any], num_tokens: int) -> NDArray[np.float32]:
    if len(values) != num_tokens:
        raise _BadRow(f"'sampler_log_probs' has {len(values)} values for {num_tokens} response tokens: it needs one for each")
    if not all(map(_is_number, values)):
        raise _BadRow("'sampler_log_probs' must hold numbers")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused
        result = np.array(values, dtype=np.float32)
    if not np.isfinite(result).all():
        raise _BadRow(f"'sampler_log_probs' is not finite at token {int(np.flatnonzero(~np.isfinite(result))[0])}")
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
