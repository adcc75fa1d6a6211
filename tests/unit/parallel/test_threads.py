"""The threads of a rank on a machine without GPUs."""

from __future__ import annotations

import pytest
import torch

from kdrl_mcore.parallel import platform


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (16, 1, 15), (16, 4, 3), (16, 16, 1), (4, 8, 1)]
)
def test_a_rank_leaves_a_core_to_the_processes_beside_it(
    cores: int, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(platform, "num_cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = platform.choose_threads()
    assert taken == [threads] and said is not None and f"{ranks} rank(s) on {cores} cores" in said


@pytest.mark.parametrize(
    ("chosen", "is_kept"),
    [("2", True), (" 2 ", True), ("4,2", True), ("", False), ("0", False), ("-1", False), ("many", False), ("2.5", False)],
)
def test_the_users_number_is_kept_if_openmp_accepts_it(chosen: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP ignores what it does not accept, and would use every core."""
    taken: list[int] = []
    monkeypatch.setattr(platform, "num_cores", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    said = platform.choose_threads() or ""
    assert taken == ([] if is_kept else [3])
    assert (f"OMP_NUM_THREADS={chosen!r} is no number and ignored" in said) != is_kept
