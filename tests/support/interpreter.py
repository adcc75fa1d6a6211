"""Triton's interpreter without its largest cost."""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """Make the interpreter patch Triton's operations once and keep them patched.

    By default it searches Triton's modules and patches them whenever a kernel is launched or calls a function, which takes half
    of a kernel's time. A process that interprets kernels compiles none, so the patches may stay.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            patch(function)  # the scope that it returns could undo the patches
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def import_interpreter() -> None:
    """Import torch and the interpreter, in a process in which `TRITON_INTERPRET` is set."""
    from tests.support.fork_server import import_torch

    import_torch()
    patch_language_once()
