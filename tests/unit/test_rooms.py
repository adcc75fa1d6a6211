"""Imports go down: a room uses rooms of lower floors, or of its own floor without going round in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.support import ROOT

PACKAGE = ROOT / "kdrl_mcore"
FLOORS = (
    {"errors", "types", "config"},
    {"objective", "resilience"},
    {"vocab_parallel", "parallel"},
    {"model", "convert"},
    {
        *("student", "teacher", "rollout", "reward", "data", "evaluation", "checkpointing", "run_directory"),
        *("monitoring", "planning", "studies", "preflight"),
    },
    {"trainer", "iteration", "supervised", "build", "job", "step_metrics", "self_test"},
    {"cli"},
    {"train"},
)
"""From the ground up; `docs/architecture.md` tells what lives in each room."""


def rooms() -> dict[str, list[Path]]:
    """Each room's files: a folder of the package, or a file of its own."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__" and path.name != "__main__.py":  # which only starts a command
            found.setdefault(room, []).append(path)
    return found


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == "kdrl_mcore" and len(parts) > 2}


def test_every_room_has_one_floor() -> None:
    assert sorted(room for floor in FLOORS for room in floor if room in rooms()) == sorted(rooms())


def test_imports_go_down_and_never_round() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    graph: dict[str, set[str]] = {}
    for room, files in rooms().items():
        for path in files:
            for other in imported_rooms(path) - {room}:
                assert floor_of[other] <= floor_of[room], f"{path.relative_to(PACKAGE)} imports {other}, which is above it"
                graph.setdefault(room, set()).add(other)
    TopologicalSorter(graph).prepare()  # raises CycleError
