"""`make contracts`: read the signatures of what we use from the published CUDA wheels, without installing or importing
them, and write them to `signatures.json`; say what does not fit our code.

    python -m tests.contracts.read_wheels [--wheels DIR]

It needs griffe and the package index. The wheels are 700 MB; with --wheels they stay in DIR for the next run.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import griffe

from tests.contracts.check import CLASS, FUNCTION, SIGNATURES, VALUE, mismatches
from tests.contracts.uses import uses

RELEASES = (
    "megatron-core==0.16.1",
    "megatron-core==0.19.2",
    "vllm==0.32.0",
    "vllm==0.33.0",
    "transformer-engine==2.9.0",
    "transformer-engine==2.11.0",
)
"""Transformer Engine: the oldest and newest version that Megatron-Core 0.16.1 accepts. Its pure wheel has the Python
sources."""
_FOR_CUDA = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
_FOR_CUDA += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)]


def download(release: str, folder: Path) -> Path:
    """The release's wheel, downloaded into `folder` unless it is there."""
    name, version = release.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_FOR_CUDA, "--dest", str(folder), release]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def read(wheel: Path, names: list[str]) -> dict[str, Any]:
    """The signature of each of these names in a wheel; None if it has no such name."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
        source = _Source(folder)
        return {name: _signature(source, name) for name in names}


class _Source:
    """The modules of an unpacked wheel, each of which is read when it is first needed."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._modules: dict[tuple[str, ...], Any] = {}

    def find(self, name: str) -> Any:
        """The object with this full name, followed through imports; None if there is none."""
        parts = name.split(".")
        module = next((i for i in range(len(parts), 0, -1) if self._is_module(parts[:i])), 0)
        if not module:
            return None
        current: Any = self._module(parts[:module])
        for part in parts[module:]:
            if current.is_class:
                current = next(filter(None, (_member(base, part) for base in self.bases(current))), None)
            else:
                current = current.members.get(part)
            if current is None:
                return None
            if current.is_alias:
                current = self.find(current.target_path)
                if current is None:
                    return None
        return current

    def bases(self, cls: Any) -> list[Any]:
        """The class and its base classes, nearest first, without those that are not in the wheel."""
        found = [cls]
        for base in cls.bases:
            parent = self.find(getattr(base, "canonical_path", str(base)))
            if parent is not None and parent.is_class:
                found += self.bases(parent)
        return found

    def _is_module(self, parts: list[str]) -> bool:
        return self._file(parts).is_file() or self._folder.joinpath(*parts).is_dir()

    def _file(self, parts: list[str]) -> Path:
        path = self._folder.joinpath(*parts)
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _module(self, parts: list[str]) -> Any:
        """A module; its packages are read as well."""
        key = tuple(parts)
        if key not in self._modules:
            parent = self._module(parts[:-1]) if len(parts) > 1 else None
            file = self._file(parts)
            code = file.read_text() if file.is_file() else ""  # megatron is a package without a file
            self._modules[key] = griffe.visit(parts[-1], filepath=file, code=code, parent=parent)
        return self._modules[key]


def _member(cls: Any, name: str) -> Any:
    """What the class itself defines or assigns under this name; griffe does not see `self.a, self.b = ...`."""
    if name in cls.members:
        return cls.members[name]
    code = "\n".join(cls.filepath.read_text().splitlines()[cls.lineno - 1 : cls.endlineno])
    nodes = ast.walk(ast.parse(textwrap.dedent(code)))
    targets = [
        target for node in nodes if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Tuple)
    ]
    assigned = {ast.unparse(each) for target in targets for each in target.elts}
    return griffe.Attribute(name) if f"self.{name}" in assigned else None


def _signature(source: _Source, name: str) -> Any:
    found = source.find(name)
    if found is None:
        return None
    if found.is_class:
        bases = source.bases(found)
        abstract = {}
        for base in reversed(bases):
            abstract |= {member.name: _is_abstract(member) for member in base.members.values() if member.is_function}
        return {
            "kind": CLASS,
            "parameters": _constructor(bases),
            "abstract": sorted(name for name, is_abstract in abstract.items() if is_abstract),
        }
    if found.is_function:
        is_method = found.parent is not None and found.parent.is_class and "staticmethod" not in found.labels
        return {"kind": FUNCTION, "parameters": _parameters(found, skip=1 if is_method else 0)}
    return {"kind": VALUE, "text": str(found.value)} if name.rsplit(".", 1)[1].isupper() else {"kind": VALUE}


def _is_abstract(member: Any) -> bool:
    return any("abstractmethod" in str(decorator.value) for decorator in member.decorators)


def _constructor(bases: list[Any]) -> str:
    """The parameters of `__init__`, or the fields that a dataclass or the like takes, in order."""
    for base in bases:
        init = base.members.get("__init__")
        if init is not None and init.is_function:
            return _parameters(init, skip=1)
    fields: dict[str, bool] = {}  # whether each has a default
    if _is_dataclass(bases[0]):
        bases = [base for base in bases if _is_dataclass(base)]
    for base in reversed(bases):
        for member in base.members.values():
            is_field = not member.is_alias and member.is_attribute and "property" not in member.labels
            if is_field and "ClassVar" not in str(member.annotation or "ClassVar"):
                value = str(member.value or "")
                fields[member.name] = bool(value) and (not value.startswith("field(") or "default" in value)
    in_order = list(fields.values()) == sorted(fields.values())
    words = [f"{name}=..." if has_default else name for name, has_default in fields.items()]
    return f"({', '.join(words if in_order or not words else ['*', *words])})"


def _is_dataclass(cls: Any) -> bool:
    return any("dataclass" in str(decorator.value) for decorator in cls.decorators)


def _parameters(function: Any, skip: int) -> str:
    """Parameters as Python writes them, without types, and with `...` for each default."""
    words: list[str] = []
    for parameter in list(function.parameters)[skip:]:
        kind, default = parameter.kind.value, "" if parameter.default is None else "=..."
        if kind == "keyword-only" and not any(word.startswith("*") for word in words):
            words.append("*")
        words.append({"variadic positional": "*", "variadic keyword": "**"}.get(kind, "") + parameter.name)
        words[-1] += "" if "variadic" in kind else default
    return f"({', '.join(words)})"


def main() -> int:
    """Read every release and write the table; returns 1 if our code does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder that keeps the wheels")
    options = parser.parse_args()
    used = uses()
    with tempfile.TemporaryDirectory() as folder:
        wheels = options.wheels or Path(folder)
        wheels.mkdir(parents=True, exist_ok=True)
        table = {}
        for release in RELEASES:
            package = release.split("-core")[0].split("==")[0].replace("-", "_")
            print(f"reading {release}", flush=True)
            table[release] = read(download(release, wheels), sorted(n for n in used if n.split(".")[0] == package))
    SIGNATURES.write_text(
        "{\n"
        + ",\n".join(
            f"{json.dumps(release)}: {{\n"
            + ",\n".join(f" {json.dumps(name)}: {json.dumps(signature)}" for name, signature in names.items())
            + "\n}"
            for release, names in table.items()
        )
        + "\n}\n"
    )
    wrong = mismatches(used, table)
    print("\n".join(wrong) or f"{len(used)} names fit {len(RELEASES)} releases")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
