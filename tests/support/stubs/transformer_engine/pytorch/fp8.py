"""FP8, which is always off."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any


class FP8GlobalStateManager:
    """Says that FP8 is off."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def get_fp8_recipe(cls) -> None:
        return None


def fp8_autocast(enabled: bool = True, **_: Any) -> Any:
    """A context in which FP8 is off."""
    if enabled:
        raise NotImplementedError("the stand-in for Transformer Engine has no FP8")
    return nullcontext()


def fp8_model_init(enabled: bool = True, **_: Any) -> Any:
    """A context in which weights are not FP8."""
    return fp8_autocast(enabled)
