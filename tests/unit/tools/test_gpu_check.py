"""`make gpu-check`: every stage gets its turn whatever became of the others, and what is known is on disk; what a bare machine
lacks is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_check, gpu_wheels


def test_a_stage_that_fails_or_hangs_does_not_keep_the_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "MOST", {"sample": 0.05})
    results = tmp_path / "results.json"
    arguments = ["--json", str(results), "--under", "tests.support.stage_runner", "--only", "head", "sample", "matrices"]
    assert gpu_check.main([*arguments, "--seconds", "60"]) == 1
    found = json.loads(results.read_text())
    assert list(found) == ["head", "sample", "matrices"]
    assert found["head"]["error"] == "exit code 1: the kernel does not compile"
    assert found["sample"]["error"].startswith("not done after ")
    assert found["matrices"]["bfloat16_tflops"] == 500 and "error" not in found["matrices"]
    shown = capsys.readouterr().out
    assert "matrices: bfloat16_tflops 500" in shown and "details" not in shown


def test_what_has_no_time_left_is_named(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = ["--json", str(results), "--under", "tests.support.stage_runner", "--only", "matrices", "--seconds", "0.5"]
    assert gpu_check.main(arguments) == 1
    assert json.loads(results.read_text())["matrices"]["error"] == "no time was left of --seconds=0.5"


def test_a_bare_machine_gets_what_training_imports_and_nothing_heavy() -> None:
    needed = gpu_wheels.needed()
    assert {"megatron-core", "transformers", "hydra-core", "math-verify", "antlr4-python3-runtime", "pytest"} <= needed.keys()
    assert not {"torch", "triton", "numpy", "datasets", "pyarrow", "pandas", "matplotlib", "tensorboard"} & needed.keys()


def test_training_imports_neither_data_sets_nor_pictures() -> None:
    heavy = ["datasets", "pyarrow", "pandas", "matplotlib", "vllm", "fastapi"]  # Megatron-Core itself tries tensorboard
    code = (
        "import sys\n"
        "from kdrl_mcore.parallel.platform import prepare_platform\n"
        "prepare_platform()\n"
        "import kdrl_mcore.cli.train, kdrl_mcore.trainer, kdrl_mcore.build\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
