"""The scores of responses that a verifier could not judge."""

from __future__ import annotations

from typing import Literal


class Unjudged(float):
    """The score 0 of a response that was not judged wrong: judging it took too long, or ended the process."""

    cause: Literal["timeout", "crash"]

    def __new__(cls, cause: Literal["timeout", "crash"]) -> Unjudged:
        """The score with its cause, which goes into the metrics."""
        made = super().__new__(cls, 0.0)
        made.cause = cause
        return made

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.cause,)


TIMEOUT, CRASH = Unjudged("timeout"), Unjudged("crash")
