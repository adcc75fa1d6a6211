"""The model below the student's adapters as a reference or a teacher: the student with its adapters off, no second copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.model.lora import without_adapters
from kdrl_mcore.teacher.teacher import Teacher


class FrozenBase(Teacher):
    """Scores in the student's layout, with the student's frozen weights. It gives no hidden states: under sequence or context
    parallelism a rank has only some of the tokens."""

    def __init__(self, student: ModelParts) -> None:
        self.parts = student

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with without_adapters(self.parts.chunks):
            yield
