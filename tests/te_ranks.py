"""Ranks whose layers are Transformer Engine's: the stand-in of `tests/stubs`, on the CPU that stands for a GPU."""

from __future__ import annotations

from pathlib import Path

STUBS = str(Path(__file__).parent / "stubs")
"""First on the path of a pool of such ranks."""


def play_transformer_engine() -> None:
    """Run first on every rank of a pool: let the stand-in serve there, though there is no GPU."""
    from kdrl_mcore.parallel import mcore

    mcore.why_no_transformer_engine = lambda: None  # type: ignore[assignment]
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    mcore._prepare_local_experts()  # what the dispatcher wants of tensors on a CPU
