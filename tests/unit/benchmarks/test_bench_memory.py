"""`tools/bench.py memory`: measured ranks compared with the plan; a failure in a rank is reported, and no process is left."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing import Pipe
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.memory import collect
from kdrl_mcore.errors import KdrlError

SMALL = ["memory", "--hidden", "128", "--layers", "4", "--vocab", "256", "--tokens", "32", "--micro-batches", "1"]


def test_two_ranks_are_measured_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, before = tmp_path / "memory.json", multiprocessing.active_children()
    assert bench.main([*SMALL, "--layouts", "pipeline, recompute, bfloat16", "--json", str(file)]) == 0
    assert [child for child in multiprocessing.active_children() if child not in before] == []
    rows = json.loads(file.read_text())
    assert [row["stage"] for row in rows] == [0, 1] == [row["measured"]["stage"] for row in rows]
    for row in rows:
        held, live, planned = row["measured"]["held"], row["measured"]["live"], row["planned"]
        assert held["peak"] > 0 and held["peak"] >= held["between"] and row["measured"]["loaded"] >= 0
        assert live["peak"] > live["between"] == pytest.approx(planned["between"], rel=0.05)
        assert planned["peak"] > planned["between"]
    shown = capsys.readouterr().out
    assert "pipeline, recompute, bfloat16, 0" in shown and "resident" in shown


def test_a_failed_rank_is_named_while_the_other_waits() -> None:
    (waiting, _open), (failed, its) = Pipe(), Pipe()
    its.send("ModelError: no weights")
    with pytest.raises(KdrlError, match="rank 1: ModelError: no weights"):
        collect({waiting: "rank 0", failed: "rank 1"})
    its.close()
    with pytest.raises(KdrlError, match="rank 1: its process died"):
        collect({waiting: "rank 0", failed: "rank 1"})


@pytest.mark.parametrize("options", [["--hidden", "100"], ["--layers", "6"], ["--tokens", "16"], ["--micro-batches", "0"]])
def test_bad_options_are_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert options[0] in error and error.count("\n") == 1
