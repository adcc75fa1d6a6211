"""Host memory for engines on a machine without GPUs: engines that do not fit are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrl_mcore.rollout.vllm import host_memory


@pytest.mark.parametrize(("engines", "tensor", "fits"), [(1, 1, True), (2, 1, True), (3, 1, False), (1, 3, False)])
def test_engines_that_do_not_fit_are_told(
    engines: int, tensor: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 GiB in bfloat16 is 2 GiB in float32; a KV cache and a process are 1.5 + 1.5 GiB: 5 GiB, and 11 GiB of three workers."""
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(host_memory.GIB)
    monkeypatch.setattr(host_memory, "free_memory", lambda: int(10.5 * host_memory.GIB))
    said = host_memory.tight_memory(host_memory.engine_gib(str(tmp_path), "float32", tensor, 1.5), engines)
    assert (said is None) == fits
    if said is not None:
        assert f"{engines} engine(s)" in said and "10.5 GiB are free" in said and "rollout.vllm.replicas" in said
