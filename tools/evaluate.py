"""`kdrl-evaluate` in a checkout: torchrun --nproc-per-node 2 tools/evaluate.py --model DIR --data FILE --samples 16"""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.evaluate())
