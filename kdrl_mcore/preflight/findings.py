"""The result of a check, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.parallel.collect import gather_objects


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    good: bool
    text: str


class CheckFailed(Exception):
    """A check failed; the message says what is wrong and what to do."""


def find(name: str, check: Callable[[], str]) -> Finding:
    """Run one check on every rank. It passes if it passes on all ranks; otherwise the text is that of the first rank that
    failed. Collective over the world."""
    try:
        mine = Finding(name, True, check())
    except (CheckFailed, KdrlError) as error:
        mine = Finding(name, False, str(error))
    findings = gather_objects(mine)
    return next((finding for finding in findings if not finding.good), findings[0])
