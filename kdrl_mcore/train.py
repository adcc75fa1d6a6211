"""Train: `torchrun --nproc-per-node N -m kdrl_mcore.train experiment=NAME key=value ...` (`kdrl_mcore/cli/train.py`)."""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.train())
