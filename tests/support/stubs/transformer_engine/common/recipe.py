"""The names of the FP8 recipes, which nothing here uses."""

from __future__ import annotations


class Recipe:
    """A recipe cannot be made here."""

    def __init__(self, **_: object) -> None:
        raise NotImplementedError("the stand-in for Transformer Engine has no FP8")


class DelayedScaling(Recipe): ...


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class MXFP8BlockScaling(Recipe): ...


class NVFP4BlockScaling(Recipe): ...
