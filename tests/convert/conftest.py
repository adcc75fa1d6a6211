"""The command that the conversion tests call."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The command kdrl-convert."""
    from kdrl_mcore.cli import convert

    return convert


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """The tool sets a signal handler; the tests leave none."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
