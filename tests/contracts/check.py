"""Our code against the signatures of the releases it must work with."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.contracts.uses import Use

SIGNATURES = Path(__file__).with_name("signatures.json")
"""By release and name: null if the release lacks it; otherwise its kind, its parameters as Python writes them, and for a class
the methods that a derived class must define."""
CLASS, FUNCTION, VALUE = "class", "function", "value"


def mismatches(used: Mapping[str, Use], table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each use in our code that does not fit a release."""
    found = []
    for release, signatures in table.items():
        package = release.split("-core")[0].split("==")[0].replace("-", "_")
        for name, use in used.items():
            if name.split(".")[0] == package:
                where = f"{release}: {name}, used in {', '.join(sorted(use.files))}"
                if name not in signatures:
                    found.append(f"{where}: not in the table: run make contracts")
                elif signatures[name] is None:
                    found.append(f"{where}: does not exist")
                else:
                    found += [f"{where}: {reason}" for reason in _misfits(use, signatures[name])]
    return found


def _misfits(use: Use, signature: Mapping[str, Any]) -> list[str]:
    found = []
    missing = [method for method in signature.get("abstract", ()) if use.derived and method not in use.methods]
    if missing:
        found.append(f"our class lacks {', '.join(missing)}")
    if "parameters" not in signature:
        return found
    function = ast.parse(f"def f{signature['parameters']}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    by_position = [argument.arg for argument in arguments.args]
    by_keyword = {argument.arg for argument in arguments.args + arguments.kwonlyargs}
    required = set(by_position[: len(by_position) - len(arguments.defaults)])
    required |= {a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None}
    for count, keywords, unpacked in use.calls:
        unknown = keywords - by_keyword
        if unknown and arguments.kwarg is None:
            found.append(f"has no argument {', '.join(sorted(unknown))}")
        if count > len(by_position) and arguments.vararg is None:
            found.append(f"takes {len(by_position)} arguments by position, not {count}")
        left = required - keywords - set(by_position[:count])
        if left and not unpacked:
            found.append(f"needs {', '.join(sorted(left))}")
    return found
