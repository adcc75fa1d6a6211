"""Marks for functions that wait for other ranks or for engines. The watchdog does not count the time in them as a rank's own
work, and does not blame a rank that is in one of them for a hang."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_marked: set[CodeType] = set()


def waits_for_others(function: Function) -> Function:
    """Mark a function whose own lines wait for others, and return it unchanged. The functions it calls are not marked."""
    _marked.add(function.__code__)
    return function


def is_marked(code: CodeType) -> bool:
    """Whether this is the code of a marked function."""
    return code in _marked
