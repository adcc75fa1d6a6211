"""Preflight: `torchrun ... -m kdrl_mcore.preflight [key=value ...]` (`kdrl_mcore/cli/preflight.py`)."""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.preflight())
