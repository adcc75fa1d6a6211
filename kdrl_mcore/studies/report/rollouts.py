"""A sample of a run's rollouts for the report: a few groups of a few steps, token by token.

Each token has the log-ratio d = log T - log pi, if the step's file has the teacher's log-probs, and log pi as sampled. Each
response has its group-relative advantage, computed as in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from kdrl_mcore.errors import DataError
from kdrl_mcore.objective.advantages import group_advantages
from kdrl_mcore.rollout.files import read_scored
from kdrl_mcore.studies.report.runs import RunHistory
from kdrl_mcore.types import Rollout, TokenFloats

STEPS, GROUPS, RESPONSES = 5, 2, 4
"""The most steps of a run, prompts of a step and responses to a prompt that are shown."""
LONGEST = 1500
"""The most tokens of a response that are shown."""

Scored = tuple[Rollout, dict[str, TokenFloats]]


def sample_rollouts(run: RunHistory, max_tokens: int) -> list[dict[str, Any]]:
    """At most about `max_tokens` response tokens of the run in the page's form: one dict for each prompt of a step.

    Takes the first and the last step and some in between; in each, prompts whose responses differ in reward come first. Files
    that cannot be read (damaged, or just being replaced) are skipped.
    """
    files = rollout_files(run)
    text_of = token_texts(run)
    samples: list[dict[str, Any]] = []
    left = max_tokens
    for file in _spread(files, STEPS):
        try:
            scored = read_scored(file)
        except DataError:
            continue
        groups: dict[int, list[Scored]] = {}
        for each in scored:
            groups.setdefault(each[0].group_id, []).append(each)
        ranked = sorted(groups.values(), key=_is_uniform)
        for group in ranked[:GROUPS]:
            sample = _prompt(run, int(file.stem.removeprefix("step_")), group, text_of)
            used = sum(len(response["tokens"]) for response in sample["responses"])
            if samples and used > left:
                return samples
            left -= used
            samples.append(sample)
    return samples


def rollout_files(run: RunHistory) -> list[Path]:
    """The run's rollout files in the order of their steps; other files there, such as copies, are left out."""
    found = (run.directory / "rollouts").glob("step_*.jsonl")
    return sorted(path for path in found if path.is_file() and re.fullmatch(r"step_\d{6,}\.jsonl", path.name))


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the files, evenly spaced and including both ends."""
    if len(files) <= count:
        return list(files)
    return [files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)]


def _is_uniform(group: Sequence[Scored]) -> bool:
    return len({rollout.reward for rollout, _ in group}) == 1


def _prompt(run: RunHistory, step: int, group: Sequence[Scored], text_of: Callable[[int], str]) -> dict[str, Any]:
    rewards = torch.tensor([rollout.reward for rollout, _ in group], dtype=torch.float64)
    by_std = bool(run.config.get("objective.normalize_by_std", True))
    advantages = group_advantages(rewards, torch.zeros(len(group), dtype=torch.long), normalize_by_std=by_std).tolist()
    row = next((row for row in run.rows if row["step"] == step), {})
    first = group[0][0]
    best_and_worst = sorted(range(len(group)), key=lambda i: -rewards[i].item())
    shown = sorted({best_and_worst[round(i * (len(group) - 1) / max(1, RESPONSES - 1))] for i in range(RESPONSES)})
    return {
        "step": step,
        "prompt": first.prompt or str(first.prompt_token_ids.tolist()),
        "answer": first.answer,
        "alpha": row.get("alpha", 1.0),
        "beta": row.get("beta", 0.0),
        "size": len(group),
        "correct": sum(rollout.correct for rollout, _ in group),
        "responses": [_response(*group[i], advantages[i], text_of) for i in shown],
    }


def _response(
    rollout: Rollout, scores: dict[str, TokenFloats], advantage: float, text_of: Callable[[int], str]
) -> dict[str, Any]:
    student = scores.get("log_probs", scores["sampler_log_probs"])
    teacher = scores.get("teacher_log_probs")
    return {
        "tokens": [text_of(token) for token in rollout.response_token_ids[:LONGEST].tolist()],
        "cut": max(0, len(rollout.response_token_ids) - LONGEST),
        "log_prob": _round(student),
        "log_ratio": None if teacher is None else _round(teacher - student),
        "advantage": round(advantage, 3),
        "reward": round(rollout.reward, 4),
        "correct": rollout.correct,
        "finish": rollout.finish_reason,
    }


def _round(values: TokenFloats) -> list[float]:
    return [round(float(value), 3) for value in values[:LONGEST]]


def token_texts(run: RunHistory) -> Callable[[int], str]:
    """A function from token id to text, by the run's tokenizer if it can still be found; otherwise the text is the id."""
    folders = [run.directory / "hf", Path(str(run.config.get("student.path", "")))]
    for file in (folder / "tokenizer.json" for folder in folders):
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception:  # it is missing or damaged: the library defines no error class
            continue
        return lambda token: tokenizer.decode([token], skip_special_tokens=False)
    return lambda token: f"[{token}]"
