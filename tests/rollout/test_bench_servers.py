"""`tools/bench.py step` with two replicas and a real vLLM server: every mode runs, the teacher scores early where it should,
and no process or file is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.replicas import MODES as REPLICA_MODES
from benchmarks.servers import MODES
from tests.support import ROOT
from tests.support.vllm_models import QUIET_ENGINE, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(600)]


def test_the_step_benchmark_measures_every_measure_and_ends_its_processes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "step", "--pairs", "tiny", "--repeats", "1"]
    temporary = tmp_path / ("as_long_as_on_clusters" * 5)  # too long for the sockets that vLLM would put there
    temporary.mkdir()
    environment = {**os.environ, **QUIET_ENGINE, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "COLUMNS": "120"}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "step.json")], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    ratios = ("KDRL / GRPO", "KDRL, mask, teacher while sampling / GRPO", "KDRL / GRPO, both one step ahead")
    measures = (
        *(
            "packing, against padding",
            "micro-batches, against one",
            "recompute",
            "teacher pruned by mask",
            "no old-policy pass",
        ),
        *("overlapped gradient reduction", "overlapped parameter gathering"),
        *("teacher while servers sample", "one-step-off generation"),
    )
    for line in (*MODES, *ratios, *(f"saved by {measure}" for measure in measures)):
        assert line in done.stdout

    report = json.loads((tmp_path / "step.json").read_text())["tiny"]
    peaks = [report[f"training: {method}"]["peak_bytes"] for method in ("KDRL, recompute", "KDRL", "KDRL, one micro-batch")]
    assert 0 < peaks[0] < peaks[1] < peaks[2]
    replicas = report["two replicas"]
    assert list(replicas["seconds"]) == list(REPLICA_MODES) and replicas["gradient_bytes"] == replicas["weight_bytes"] > 0
    measured = report["with a vLLM server"]
    assert list(measured) == list(MODES)
    for mode, (metrics,) in measured.items():
        assert metrics["skipped_updates"] == 0
        assert 0.3 < metrics["accuracy"] < 0.9  # 0.6 of all possible responses
        assert (metrics["teacher_tokens"] > 0) == mode.startswith("KDRL")
        assert (metrics["teacher_tokens_early"] > 0) == ("while sampling" in mode)

    masked, plain = (measured[mode][0]["teacher_tokens"] for mode in ("KDRL, mask", "KDRL"))
    assert masked < plain

    deadline = time.monotonic() + 60
    while left := processes_of(temporary):
        assert time.monotonic() < deadline, left


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line or temporary folder names the folder: the command, its replicas and its engine."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if str(folder) in " ".join(process.info["cmdline"] or ())
        or (process.info["environ"] or {}).get("TMPDIR") == str(folder)
    ]
