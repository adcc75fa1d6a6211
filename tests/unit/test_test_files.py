"""How the tests are built: what they share is in `tests.support`, and the reference does not import what it judges."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support import ROOT

TESTS = ROOT / "tests"


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere, also in functions and in code that it has as a string."""
    text = path.read_text()
    names = set(re.findall(r"\btests(?:\.\w+)+", text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_file_imports_a_test_file_or_a_conftest() -> None:
    for path in TESTS.rglob("*.py"):
        found = [name for name in imported(path) if re.match(r"tests\..*\b(test_\w+|conftest)\b", name)]
        assert not found, f"{path} imports {found}: move what they share to tests/support"


def test_the_reference_imports_nothing_of_ours() -> None:
    for path in (TESTS / "reference").rglob("*.py"):
        ours = [name for name in imported(path) if re.match(r"(kdrl_mcore|benchmarks|tools|examples|tests)\b", name)]
        assert all(name.startswith("tests.reference") for name in ours), path
