"""Packages import only from lower layers, or without cycles from their own layer."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.support import ROOT

PACKAGE = ROOT / "kdrl_mcore"
LAYERS = (
    {"errors", "types", "config"},
    {"objective", "resilience"},
    {"vocab_parallel", "parallel"},
    {"model", "convert"},
    {
        *("student", "teacher", "rollout", "reward", "data", "evaluation", "checkpointing", "run_directory"),
        *("monitoring", "planning", "studies", "preflight"),
    },
    {"trainer", "iteration", "supervised", "build", "build_data", "build_teachers", "job", "step_metrics", "self_test"},
    {"cli"},
    {"train"},
)
"""The packages of each layer, the lowest first, as in docs/architecture.md."""


def packages() -> dict[str, list[Path]]:
    """The files of each subpackage or top-level module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package != "__init__" and path.name != "__main__.py":  # it only starts a command
            found.setdefault(package, []).append(path)
    return found


def imported_packages(path: Path) -> set[str]:
    """The subpackages and modules that a file imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == "kdrl_mcore" and len(parts) > 2}


def test_every_package_has_one_layer() -> None:
    assert sorted(package for layer in LAYERS for package in layer if package in packages()) == sorted(packages())


def test_imports_go_down_without_circles() -> None:
    layer_of = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    graph: dict[str, set[str]] = {}
    for package, files in packages().items():
        for path in files:
            for other in imported_packages(path) - {package}:
                assert layer_of[other] <= layer_of[package], f"{path.relative_to(PACKAGE)} imports {other}, which is above it"
                graph.setdefault(package, set()).add(other)
    TopologicalSorter(graph).prepare()  # raises CycleError
