"""Hugging Face folders compared by their bytes, and converted without a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def quiet(total: int) -> Any:
    """Accepts progress and shows nothing."""
    return lambda num_bytes: None


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an HF folder."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bytes(one: Path, other: Path) -> None:
    """Assert that two HF folders hold the same tensors: names, dtypes, shapes and bytes."""
    left, right = all_tensors(one), all_tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape)
        assert torch.equal(tensor.view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)), name
