"""Models for the tests with real vLLM, whose CPU kernels require head dimensions of at least 32."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.reference.tiny_models import make_qwen2, make_tokenizer, write_jsonl

SHAPE: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
QUIET_ENGINE = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make setup installs it where there is a wheel"
)


def make_student(path: Path, seed: int = 1) -> Path:
    """A random Qwen2 with 67 vocabulary columns and a tokenizer of 61 tokens: the other columns must never be sampled."""
    make_qwen2(path, seed=seed, **SHAPE)
    make_tokenizer(path)
    return path


def make_prompts(path: Path, count: int = 16) -> Path:
    """Write sums with their answers."""
    return write_jsonl(path, [{"prompt": f"{a}+{a % 7}=", "answer": str(a + a % 7)} for a in range(count)])


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with `changes`."""
    return {**os.environ, **changes}
