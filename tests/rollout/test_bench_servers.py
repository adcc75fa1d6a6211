"""`tools/bench.py step` with a real vLLM server: every mode runs, the teacher scores early where it should, nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.rollout.models import QUIET_ENGINE, needs_vllm
from tools.bench_servers import MODES

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def test_the_step_benchmark_takes_turns_on_one_server_and_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "step", "--pairs", "tiny", "--repeats", "1", "--no-replicas"]
    environment = {**os.environ, **QUIET_ENGINE, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "COLUMNS": "120"}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "step.json")], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    ratios = ("KDRL / GRPO", "KDRL, mask, teacher while sampling / GRPO", "KDRL / GRPO, both one step ahead")
    saved = ("saved by teacher while servers sample", "saved by one-step-off generation")
    for line in (*MODES, *ratios, *saved):
        assert line in done.stdout

    measured = json.loads((tmp_path / "step.json").read_text())["tiny"]["with a vLLM server"]
    assert list(measured) == list(MODES)
    for mode, (metrics,) in measured.items():
        assert metrics["skipped_updates"] == 0
        assert 0.3 < metrics["accuracy"] < 0.9  # 0.6 of all possible responses
        assert (metrics["teacher_tokens"] > 0) == mode.startswith("KDRL")
        assert (metrics["teacher_tokens_early"] > 0) == ("while sampling" in mode)

    masked, plain = (measured[mode][0]["teacher_tokens"] for mode in ("KDRL, mask", "KDRL"))
    assert masked < plain

    deadline = time.monotonic() + 10
    while left := engines_below(tmp_path):
        assert time.monotonic() < deadline, left


def engines_below(folder: Path) -> list[int]:
    """Processes whose command line names a file in the folder."""
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(process.info["cmdline"] or ())
    ]
