"""Triton's kernels compile for an H100 without one: to machine code, with wide memory accesses and no spilled registers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux on x86-64)")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
H100 = 90  # compute capability


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def compile_kernel(name: str, types: dict[str, str], constants: dict[str, object], warps: int, folder: Path) -> tuple[str, str]:
    """(PTX, resource usage) of a kernel with pointers, strides and columns that are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdrl_mcore.vocab_parallel import triton_kernels

    function = getattr(triton_kernels, name)
    signature = {argument: types.get(argument, "constexpr") for argument in function.arg_names}
    even = [
        index
        for index, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*") or argument.endswith("_stride") or argument == "columns"
    ]
    source = ASTSource(function, signature, constants, {(index,): [["tt.divisibility", 16]] for index in even})
    kernel = triton.compile(source, target=GPUTarget("cuda", H100, 32), options={"num_warps": warps})
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", folder / "kernel.cubin"]
    return kernel.asm["ptx"], subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("kernel", ["_statistics", "_differentiate"])
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
def test_kernels_compile_for_h100(kernel: str, logits: str, teacher: bool, tmp_path: Path) -> None:
    from kdrl_mcore.vocab_parallel import triton_kernels as kernels

    types = {"z_ptr": logits, "z_stride": "i32", "y_ptr": logits, "y_stride": "i32", "rows": "i32", "columns": "i32"}
    constants: dict[str, object] = {"TEACHER": teacher}
    if kernel == "_statistics":
        types |= {"out_ptr": "*fp32"}
        block = kernels.TEACHER_STATISTICS_BLOCK if teacher else kernels.STATISTICS_BLOCK
        constants |= {"LOWEST": kernels.MASKED, "BLOCK": block}
    else:
        types |= {"column_ptr": "*i64", "numbers_ptr": "*fp32"}
        constants |= {"BLOCK": kernels.GRADIENT_BLOCK}
    ptx, usage = compile_kernel(kernel, types, constants, kernels.WARPS, tmp_path)
    assert "ld.global.v4" in ptx
    assert "LOCAL:0" in usage and "STACK:0" in usage, usage
    registers = int(usage.split("REG:")[1].split()[0])
    assert registers * kernels.WARPS * 32 * 3 <= 65536, f"{registers} registers: fewer than three programs on a multiprocessor"


def test_columns_can_be_overwritten_on_h100(tmp_path: Path) -> None:
    types = {"d_ptr": "*bf16", "d_stride": "i32", "column_ptr": "*i64", "values_ptr": "*fp32", "count": "i32"}
    _, usage = compile_kernel("_overwrite", types, {"BLOCK": 64}, 4, tmp_path)
    assert "LOCAL:0" in usage, usage
