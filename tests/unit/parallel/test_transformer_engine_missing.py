"""If Transformer Engine is installed but does not load, Megatron-Core's layers are used and one line says why."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.preflight import machine
from kdrl_mcore.preflight.findings import CheckFailed

PROGRAM = """
import torch
torch.cuda.is_available = lambda: {cuda}
torch.cuda.set_device = lambda index: None
from kdrl_mcore.parallel.platform import prepare_platform
prepare_platform()
prepare_platform()
from kdrl_mcore.config import ModelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.layer_spec import uses_transformer_engine  # imports Megatron-Core
from megatron.core.models.gpt import gpt_layer_specs
print(uses_transformer_engine(ModelConfig(dtype="bfloat16")), gpt_layer_specs.HAVE_TE)
try:
    uses_transformer_engine(ModelConfig(spec="transformer_engine"))
except ConfigError as error:
    print(error)
"""
FAULTS = {
    "built for another torch": ("pass", "raise ImportError('undefined symbol: _ZN3c10')"),
    "no CUDA library": ("raise OSError('libcudnn.so.9: cannot open shared object file')", "pass"),
}
BROKEN_PACKAGE = """
{common}
try:
    from . import pytorch
except ImportError:
    pass
__version__ = "2.11.0"
"""


def run_with_broken_package(folder: Path, fault: tuple[str, str], *, cuda: bool) -> subprocess.CompletedProcess[str]:
    """The program with a Transformer Engine that fails as the real one does: in its top module, or, if that swallows the error,
    in its part for torch."""
    package = folder / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN_PACKAGE.format(common=fault[0]))
    (package / "pytorch" / "__init__.py").write_text(fault[1])
    program = f"import sys; sys.path.insert(0, {str(folder)!r})" + PROGRAM.format(cuda=cuda)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_megatron_core_runs_without_it_and_one_line_says_why(fault: tuple[str, str], tmp_path: Path) -> None:
    done = run_with_broken_package(tmp_path, fault, cuda=True)
    assert done.returncode == 0, done.stderr
    used, refusal = done.stdout.splitlines()
    assert used == "False False"
    (line,) = [line for line in done.stderr.splitlines() if "Transformer Engine" in line]
    reason = "undefined symbol" if "undefined" in fault[1] else "libcudnn.so.9"
    for text in (line, refusal):
        assert "is installed but cannot be imported" in text and reason in text
    assert "using Megatron-Core's own layers" in line and "model.spec=auto" in refusal


def test_without_a_gpu_it_is_not_even_tried(tmp_path: Path) -> None:
    done = run_with_broken_package(tmp_path, FAULTS["no CUDA library"], cuda=False)
    assert done.returncode == 0, done.stderr
    used, refusal = done.stdout.splitlines()
    assert used == "False False" and "needs a GPU" in refusal
    assert "Transformer Engine" not in done.stderr


@pytest.mark.parametrize("missing", [None, "Transformer Engine is installed but cannot be imported"])
def test_the_preflight_says_which_version_it_imported(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version comes from the package rather than from pip's record; if the import fails, the reason is given."""
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(__version__="2.11.0+abc"))
    monkeypatch.setattr(machine.mcore, "why_no_transformer_engine", lambda: missing)
    monkeypatch.setattr(machine, "version", lambda package: "2.11.0")
    monkeypatch.setattr(machine, "gather_objects", lambda mine: [mine])
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 28)))
    found = machine.check_versions(load_config(["objective=grpo"]))
    assert f"transformer-engine {'2.11.0+abc' if missing is None else '2.11.0 (not used)'}, " in found
    assert found.endswith("NCCL 2.28" if missing is None else f". {missing}")
    with pytest.raises(CheckFailed, match="cannot be imported") if missing else nullcontext():
        machine.check_versions(load_config(["objective=grpo", "model.spec=transformer_engine"]))


def test_the_preflight_imports_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "vllm.py").write_text("__version__ = '0.32.0'")
    assert machine.check_vllm() == "vLLM 0.32.0 imports"
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(CheckFailed, match=r"does not import on .*libcudart.so.13"):
        machine.check_vllm()
    (tmp_path / "vllm.py").write_text("import time; time.sleep(60)")
    with patch.object(machine, "IMPORT_SECONDS", 0.5), pytest.raises(CheckFailed, match="within"):
        machine.check_vllm()
