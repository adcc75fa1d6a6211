"""Rollout files: what is written is read back exactly, and damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_mcore.errors import DataError
from kdrl_mcore.rollout.files import read_rollouts, read_scored, write_rollouts
from kdrl_mcore.types import Rollout

KEYS = [
    *("prompt_id", "group_id", "prompt_token_ids", "response_token_ids", "sampler_log_probs", "reward", "correct"),
    *("finish_reason", "weight_version", "prompt", "response", "answer"),
]


def rollout(**changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "prompt_id": "train-1",
        "group_id": 3,
        "prompt_token_ids": np.array([5, 6, 7]),
        "response_token_ids": np.array([8, 9]),
        "sampler_log_probs": np.array([-0.1, -1e-7], dtype=np.float32),
        "finish_reason": "stop",
        "weight_version": 12,
        "reward": 0.1,
        "correct": True,
        "prompt": "1+1=",
        "response": 'line\nbreak "quoted" \u2028 数 \\boxed{2}',
        "answer": "2",
        "extra": {"advantage": 0.5},
    }
    return Rollout(**fields | changes)


def assert_equal(left: Rollout, right: Rollout) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype and other.tobytes() == value.tobytes(), name
        else:
            assert (type(other), other) == (type(value), value), name


def row() -> dict[str, Any]:
    return {
        "prompt_id": "p",
        "group_id": 0,
        "prompt_token_ids": [1],
        "response_token_ids": [2, 3],
        "sampler_log_probs": [-0.5, -0.25],
        "reward": 1,
        "correct": True,
        "finish_reason": "stop",
        "weight_version": 0,
    }


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step_000001.jsonl"
    rollouts = [rollout(), rollout(finish_reason="length", correct=False, reward=-1.0, extra={}, prompt="", answer="\ud800")]
    write_rollouts(path, rollouts)
    for left, right in zip(rollouts, read_rollouts(path), strict=True):
        assert_equal(left, right)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [list(json.loads(line)) for line in lines[:-1]] == [[*KEYS, "advantage"], KEYS]


def test_the_teachers_log_probs_are_written_where_it_gave_them(tmp_path: Path) -> None:
    log_probs = np.array([-0.3, -2.5], dtype=np.float32)
    write_rollouts(tmp_path / "r.jsonl", [rollout(teacher_log_probs=log_probs), rollout()])
    (_, with_teacher), (_, without) = read_scored(tmp_path / "r.jsonl")
    assert with_teacher["teacher_log_probs"].tobytes() == log_probs.tobytes() and "teacher_log_probs" not in without


def test_the_versions_of_all_tokens_stand_where_the_weights_changed_on_the_way(tmp_path: Path) -> None:
    changed = rollout(later_versions=((13, 1),))
    assert changed.versions == ((12, 1), (13, 1)) and rollout().versions == ((12, 2),)
    write_rollouts(tmp_path / "r.jsonl", [changed, rollout()])
    first, second = read_rollouts(tmp_path / "r.jsonl")
    assert_equal(first, changed)
    assert_equal(second, rollout())
    assert ["later_versions" in line for line in (tmp_path / "r.jsonl").read_text().split("\n")[:2]] == [True, False]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_log_probs_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("bits") / "r.jsonl"
    log_probs = np.array(values, dtype=np.float32)
    write_rollouts(path, [rollout(sampler_log_probs=log_probs, response_token_ids=np.arange(len(values)))])
    assert read_rollouts(path)[0].sampler_log_probs.tobytes() == log_probs.tobytes()


def test_numpy_scalars_are_written_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [rollout(reward=np.float32(0.5), correct=np.bool_(True), extra={"length": np.float64(2)})])
    assert_equal(read_rollouts(path)[0], rollout(reward=0.5, extra={"length": 2.0}))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [rollout()])
    before = path.read_bytes()
    with pytest.raises(DataError, match="'reward' is a key of rollout files and cannot be an extra key"):
        write_rollouts(path, [rollout(group_id=9), rollout(extra={"reward": 1.0})])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_texts_for_people_may_be_missing_and_further_keys_present(tmp_path: Path) -> None:
    line = row() | {"entropy": [0.1, 0.2], "note": "x", "flag": True, "advantage": 2}
    (one,) = read_rollouts(write_lines(tmp_path / "r.jsonl", json.dumps(line)))
    assert (one.prompt, one.response, one.answer, one.extra) == ("", "", "", {"advantage": 2.0})
    assert (one.reward, type(one.reward)) == (1.0, float)


def test_an_integer_prompt_id_becomes_text(tmp_path: Path) -> None:
    (one,) = read_rollouts(write_lines(tmp_path / "r.jsonl", json.dumps(row() | {"prompt_id": 17})))
    assert one.prompt_id == "17"


def test_non_finite_log_probs_are_written_as_evidence_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [rollout(sampler_log_probs=np.array([-1.0, np.nan], dtype=np.float32))])
    with pytest.raises(DataError, match=r"r\.jsonl line 1: 'sampler_log_probs' is not finite at token 1"):
        read_rollouts(path)


@pytest.mark.parametrize("key", KEYS[:9])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    damaged = {name: value for name, value in row().items() if name != key}
    with pytest.raises(DataError, match=f"line 2: '{key}' is missing"):
        read_rollouts(write_lines(tmp_path / "r.jsonl", json.dumps(row()), json.dumps(damaged)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler_log_probs": [-0.5]}, "'sampler_log_probs' has 1 values for 2 response tokens"),
        ({"sampler_log_probs": [-0.5, float("inf")]}, "'sampler_log_probs' is not finite at token 1"),
        ({"sampler_log_probs": [-0.5, -1e300]}, "'sampler_log_probs' is not finite at token 1"),
        ({"sampler_log_probs": [-0.5, "x"]}, "'sampler_log_probs' must hold numbers"),
        ({"sampler_log_probs": [-0.5, None]}, "'sampler_log_probs' must hold numbers"),
        ({"prompt_token_ids": []}, "'prompt_token_ids' is empty"),
        ({"response_token_ids": [], "sampler_log_probs": []}, "'response_token_ids' is empty"),
        ({"response_token_ids": [1, 2.5]}, "'response_token_ids' must hold token ids"),
        ({"response_token_ids": [1, -2]}, "'response_token_ids' must hold token ids"),
        ({"prompt_token_ids": [True]}, "'prompt_token_ids' must hold token ids"),
        ({"prompt_token_ids": "12"}, "'prompt_token_ids' is '12', it must be a list"),
        ({"finish_reason": "eos"}, "'finish_reason' is 'eos', it must be one of stop, length"),
        ({"correct": 1}, "'correct' is 1, it must be true or false"),
        ({"group_id": True}, "'group_id' is True, it must be an integer"),
        ({"group_id": 1.0}, "'group_id' is 1.0, it must be an integer"),
        (
            {"later_versions": [[4]]},
            r"'later_versions' is \[\[4\]\], it must be a list of .* of fewer tokens than the",
        ),
        ({"later_versions": [[4, 99]]}, r"'later_versions' is \[\[4, 99\]\], it must be a list"),
        ({"weight_version": "3"}, "'weight_version' is '3', it must be an integer"),
        ({"prompt_id": None}, "'prompt_id' is None, it must be text or an integer"),
        ({"reward": float("nan")}, "'reward' is nan, it must be finite"),
        ({"reward": 10**400}, r"'reward' is 1000.*\.\.\., it must be finite"),
        ({"response": 5}, "'response' is 5, it must be text"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", json.dumps(row()), json.dumps(row()), json.dumps(row() | change))
    with pytest.raises(DataError, match=rf"r\.jsonl line 3: {message}") as caught:
        read_rollouts(path)
    assert "\n" not in str(caught.value)


def test_a_cut_off_last_line_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [rollout(), rollout()])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"r\.jsonl line 2 is cut off"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rollouts"),
        (b"not json\n", r"line 1 is not JSON \(Expecting value"),
        (b"\n", r"line 1 is not JSON"),
        (b"[1]\n", "line 1: is not a JSON object"),
        (b'{"prompt_id": "\xff"}\n', "is not UTF-8 text"),
    ],
)
def test_what_is_no_rollout_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"r\.jsonl {message}"):
        read_rollouts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_rollouts(tmp_path / "gone.jsonl")
