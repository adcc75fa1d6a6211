"""docs/families.md is true: the family on that page, added as it says, converts a checkpoint there and back."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdrl_mcore.convert.convert import export_hf_folder, import_hf
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model import families
from tests.convert.test_conversion import assert_same_bytes, quiet
from tests.reference.tiny_models import make_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's family, written to a file and added; its HF architecture."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    spec = importlib.util.spec_from_file_location("example_family", tmp_path / "example.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(families.FAMILIES, module.FAMILY.hf_architecture, module.FAMILY)
    return module.FAMILY.hf_architecture


def make_example(path: Path, architecture: str) -> Path:
    """A checkpoint of the page's family: a Qwen3 one with biases and other names in the MLP."""
    make_model("qwen3", path, seed=21, attention_bias=True)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "feed_forward"}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith("o_proj.bias"):
            tensors[".".join(names.get(part, part) for part in name.split("."))] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return path


def test_the_family_on_the_page_converts_there_and_back(example: str, tmp_path: Path) -> None:
    hf = make_example(tmp_path / "hf", example)
    import_hf(hf, tmp_path / "megatron", None, quiet)
    export_hf_folder(tmp_path / "megatron", tmp_path / "back", quiet)
    assert_same_bytes(hf, tmp_path / "back")


def test_without_it_the_checkpoint_is_refused(tmp_path: Path) -> None:
    hf = make_example(tmp_path / "hf", "ExampleForCausalLM")
    with pytest.raises(ModelError, match="ExampleForCausalLM"):
        import_hf(hf, tmp_path / "megatron", None, quiet)


def test_the_page_lists_every_family_and_every_kind() -> None:
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in families.FAMILIES)
    for module in Path(families.__file__).parent.glob("*.py"):
        assert module.name in ("__init__.py", "base.py") or f"`{module.name}`" in page
