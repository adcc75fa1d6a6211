"""`make gpu-check`: every stage runs, whatever happened to the others, and all results so far are on disk; what a bare machine
lacks is found and added to what it has."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--json", str(tmp_path / "results.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: torch {torch.__version__} of {sys.executable} sees no GPU"
    assert not (tmp_path / "results.json").exists()


def test_a_bare_machine_gets_what_training_imports_and_nothing_heavy() -> None:
    needed = gpu_wheels.needed()
    assert {"megatron-core", "transformers", "hydra-core", "math-verify", "antlr4-python3-runtime", "pytest"} <= needed.keys()
    assert "numpy" in needed  # torch installs without it
    assert not {"torch", "triton", "datasets", "pyarrow", "pandas", "matplotlib", "tensorboard"} & needed.keys()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the wheels: one of a package that no machine has, and one in a version that differs from this machine's."""
    monkeypatch.setattr(gpu_wheels, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu_wheels, "SITE", tmp_path / "site")
    gpu_wheels.WHEELS.mkdir()
    for name, version in (("kdrl_example", "1.0"), ("pytest", "99.0")):
        with zipfile.ZipFile(gpu_wheels.WHEELS / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return gpu_wheels.WHEELS


def test_what_is_missing_or_of_another_version_is_unpacked_once(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_wheels.unpack() == 0
    assert {path.name for path in gpu_wheels.SITE.glob("*.py")} == {"kdrl_example.py", "pytest.py"}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is left to install"))
    assert gpu_wheels.unpack() == 0


def test_a_python_that_cannot_run_it_is_told_what_to_do(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (wheels / "kdrl_example-1.0-py3-none-any.whl").rename(wheels / "kdrl_example-1.0-cp39-cp39-any.whl")
    assert gpu_wheels.unpack() == 1
    assert f"do not fit Python {gpu_wheels.PYTHON}: pack them with make gpu-wheels FOR={gpu_wheels.PYTHON}" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(gpu_wheels.importlib.util, "find_spec", lambda name: None)
    assert gpu_wheels.unpack() == 1
    assert f"error: {sys.executable} has no torch: name a Python that has it" in capsys.readouterr().err


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
