"""The functions of an axis by name: the project's, or one of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from kdrl_mcore.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def find_function(key: str, name: str, known: Mapping[str, F]) -> F:
    """The function that a configuration key names.

    Args:
        name: one of `known`, or MODULE:NAME of a function with the same arguments and results.

    Raises:
        ConfigError: it cannot be loaded.
    """
    return known[name] if name in known else _load(key, name)


@cache
def _load(key: str, name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={name} cannot be loaded ({error}): name one of the project's, or MODULE:NAME") from error
    if not callable(found):
        raise ConfigError(f"{key}={name} is not a function")
    return found
