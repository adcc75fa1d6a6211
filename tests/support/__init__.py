"""What tests share: pools of ranks, training runs, models, servers, and programs that run in separate processes.

A test file imports from here and from `tests.reference`, never from another test file.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's folder."""
