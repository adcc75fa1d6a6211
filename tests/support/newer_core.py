"""The newer Megatron-Core that `make setup` installs next to the default one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.ranks import RankPool

BESIDE = ROOT / ".venv" / "megatron-core-0.19"
needs_newer_core = pytest.mark.skipif(
    not BESIDE.is_dir(), reason=f"{BESIDE} does not exist: make setup installs it, on Linux on x86-64"
)


def version_on_rank() -> tuple[str, str]:
    """The version that this rank has imported, and its file."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import megatron.core

    return megatron.core.__version__, megatron.core.__file__


def assert_newer(pool: RankPool) -> None:
    """Assert that the ranks have imported the newer version."""
    for version, file in pool.run(version_on_rank):
        assert version.startswith("0.19.") and Path(file).is_relative_to(BESIDE)
