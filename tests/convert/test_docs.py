"""The tutorial on families is correct: its family, added as it says, converts its checkpoint in both directions."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from kdrl_mcore.convert.convert import export_hf_folder, import_hf
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model import families
from tests.support import ROOT
from tests.support.hf_folders import assert_same_bytes, quiet

DOCS = ROOT / "docs"
CODE = re.findall(r"```python\n(.*?)```", (DOCS / "tutorials" / "own_family.md").read_text(), flags=re.DOTALL)
"""The code of the family, and the program that writes one of its checkpoints."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tutorial's family, written to a file and added; its HF architecture."""
    (tmp_path / "example.py").write_text(CODE[0])
    spec = importlib.util.spec_from_file_location("example_family", tmp_path / "example.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(families.FAMILIES, module.FAMILY.hf_architecture, module.FAMILY)
    return module.FAMILY.hf_architecture


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint that the tutorial's second program writes."""
    monkeypatch.chdir(tmp_path)
    exec(CODE[1], {})
    return tmp_path / "models" / "example"


def test_the_family_of_the_tutorial_converts_there_and_back(example: str, hf: Path, tmp_path: Path) -> None:
    assert json.loads((hf / "config.json").read_text())["architectures"] == [example]
    import_hf(hf, tmp_path / "megatron", None, quiet)
    export_hf_folder(tmp_path / "megatron", tmp_path / "back", quiet)
    assert_same_bytes(hf, tmp_path / "back")


def test_without_it_the_checkpoint_is_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ExampleForCausalLM"):
        import_hf(hf, tmp_path / "megatron", None, quiet)


def test_the_page_lists_every_family_and_every_kind() -> None:
    page = (DOCS / "families.md").read_text()
    assert all(f"`{name}`" in page for name in families.FAMILIES)
    for module in Path(families.__file__).parent.glob("*.py"):
        assert module.name in ("__init__.py", "base.py", "rope.py") or f"`{module.name}`" in page
