"""Without a GPU, Triton's kernels compile to machine code for A100, H100 and B200, called as a run calls them. Every access to
a row of logits has 16 bytes, whatever the vocabulary, and no register is spilled."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux on x86-64)")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS = 65536
"""Registers of one multiprocessor."""
ODD = 151_643
"""Qwen's tokens without the reserved ones: not a multiple of 16, and too many for one block."""

Compile = Callable[..., dict[str, Any]]


@pytest.fixture(params=[80, 90, 100], ids=["sm_80", "sm_90", "sm_100"])
def compile_kernels(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Calls a function on CPU tensors and returns the kernels that it would have launched on a GPU, by name."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    run, compiled = JITFunction.run, {}

    class Driver:
        """The driver of a GPU that does not exist. Triton remembers the kind of a device, so each kind is a separate device."""

        def get_current_device(self) -> int:
            return request.param

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", request.param, 32)

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled[kernel.fn.__name__] = run(kernel, *args, grid=grid, warmup=True, **options)

    def call(function: Callable[..., object], *args: Any) -> dict[str, Any]:
        function(*args)
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Driver())
    return call


def accesses(kernel: Any) -> Counter[str]:
    """How often each kind of access to global memory occurs in the machine-independent code."""
    return Counter(re.findall(r"\b(?:ld|st)\.global[.\w:]*", kernel.asm["ptx"]))


def check_registers(kernel: Any, folder: Path, *, programs: int) -> None:
    """No register is spilled, and this number of programs fits on a multiprocessor."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    assert "LOCAL:0" in usage and "STACK:0" in usage, usage
    registers = int(usage.split("REG:")[1].split()[0])
    assert registers * kernel.metadata.num_warps * 32 * programs <= REGISTERS, usage


def memory(dtype: torch.dtype, teacher: bool) -> Any:
    from kdrl_mcore.vocab_parallel.triton_logits import TritonLogits

    return TritonLogits.allocate(3, ODD, dtype, dtype if teacher else None, torch.device("cpu"))


def accesses_of_a_row(block: int, dtype: torch.dtype, warps: int) -> int:
    """How many accesses of 16 bytes each thread needs for its part of a block."""
    return block * dtype.itemsize // (16 * 32 * warps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
def test_statistics(compile_kernels: Compile, teacher: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    logits, models = memory(dtype, teacher), 1 + teacher
    kernel = compile_kernels(kernels.statistics, logits._student_CW, logits._teacher_buffer_CW)["_statistics"]
    block = kernels.TEACHER_STATISTICS_BLOCK if teacher else kernels.STATISTICS_BLOCK
    reads = models * accesses_of_a_row(block, dtype, kernels.WARPS)
    assert accesses(kernel) == {"ld.global.v4.b32": reads, "st.global.b32": 3 * models}
    check_registers(kernel, tmp_path, programs=3)


@pytest.mark.parametrize("forward", [False, True], ids=["reverse", "forward"])
def test_statistics_with_the_teachers_entropy(compile_kernels: Compile, forward: bool, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    logits = memory(torch.bfloat16, True)
    buffers = logits._student_CW, logits._teacher_buffer_CW
    kernel = compile_kernels(lambda: kernels.statistics(*buffers, forward=forward, teacher_entropy=True))["_statistics"]
    reads = 2 * accesses_of_a_row(kernels.TEACHER_STATISTICS_BLOCK, torch.bfloat16, kernels.WARPS)
    assert accesses(kernel) == {"ld.global.v4.b32": reads, "st.global.b32": 7}
    check_registers(kernel, tmp_path, programs=3)


@pytest.mark.parametrize("name", ["mixture", "clipped"])
def test_second_round(compile_kernels: Compile, name: str, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    logits = memory(torch.bfloat16, True)
    arguments = logits._student_CW, logits._teacher_buffer_CW, torch.zeros(4, 3), 0.3
    kernel = compile_kernels(getattr(kernels, name), *arguments)[f"_{name}"]
    reads = 2 * accesses_of_a_row(kernels.MIXTURE_BLOCK, torch.bfloat16, kernels.WARPS)
    assert accesses(kernel) == {"ld.global.v4.b32": reads, "ld.global.b32": 4, "st.global.b32": 2}
    check_registers(kernel, tmp_path, programs=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("comparison", "numbers"), [("none", 4), ("reverse", 6), ("forward", 6), ("mixture", 8), ("clipped", 8)]
)
def test_derivative(compile_kernels: Compile, comparison: Any, numbers: int, dtype: torch.dtype, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    teacher = comparison != "none"
    logits, models = memory(dtype, teacher), 1 + teacher
    kernel = compile_kernels(
        kernels.differentiate,
        logits._student_CW,
        logits._teacher_buffer_CW,
        torch.zeros(3, dtype=torch.long),
        torch.zeros(numbers, 3),
        comparison,
    )["_differentiate"]
    once = accesses_of_a_row(kernels.GRADIENT_BLOCK, dtype, kernels.WARPS)
    expected = {"ld.global.v4.b32": models * once, "st.global.v4.b32": once, "ld.global.b32": numbers, "ld.global.b64": 1}
    assert accesses(kernel) == expected
    check_registers(kernel, tmp_path, programs=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_largest_logits(compile_kernels: Compile, dtype: torch.dtype, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    logits_CW = memory(dtype, teacher=False)._student_CW.zero_()
    kernel = compile_kernels(kernels.largest, logits_CW, 20)["_largest"]
    assert accesses(kernel)["ld.global.v4.b32"] == accesses_of_a_row(kernels.LARGEST_BLOCK, dtype, kernels.WARPS)
    check_registers(kernel, tmp_path, programs=3)


def test_columns_can_be_overwritten(compile_kernels: Compile, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    column_CK = torch.zeros(3, 64, dtype=torch.long)
    arguments = (memory(torch.bfloat16, teacher=False)._student_CW, column_CK, column_CK == 0, torch.zeros(3, 64))
    check_registers(compile_kernels(kernels.overwrite, *arguments)["_overwrite"], tmp_path, programs=3)
