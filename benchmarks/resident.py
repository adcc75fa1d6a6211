"""The resident set of this process (Linux), and its peak since a chosen moment."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.errors import KdrlError


def resident_bytes() -> int:
    """The present size of the resident set."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The largest size since the process started, or since the last `restart_peak`."""
    return _status_bytes("VmHWM")


def restart_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KdrlError(f"/proc/self/status has no {name}: memory is measured on Linux only")
