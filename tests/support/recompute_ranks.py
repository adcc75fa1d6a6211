"""Counts of module calls in one update. A `RankPool` runs the functions named `*_on_rank`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from tests.support.training import train_on_rank


def forward_calls_on_rank(overrides: Sequence[str]) -> dict[str, int]:
    """How often each module of the layers ran forward during one update; the run has one step and one micro-batch."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.student.student import Student

    counted: Counter[str] = Counter()
    update = Student._forward_backward

    def watched(student: Any, micro_batches: Any) -> Any:
        hooks = []
        for chunk in student.parts.chunks:
            for name, module in chunk.named_modules():
                if (name.startswith("decoder.layers.") and [*module.parameters()]) or name.endswith("core_attention"):
                    hooks.append(module.register_forward_hook(lambda *_, name=name: counted.update([name])))
        result = update(student, micro_batches)
        for hook in hooks:
            hook.remove()
        return result

    with patch.object(Student, "_forward_backward", watched):
        outcome = train_on_rank(overrides)
    assert outcome.code == 0, outcome.stderr
    return dict(counted)
