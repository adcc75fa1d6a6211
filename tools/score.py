"""`kdrl-score` in a checkout: torchrun --nproc-per-node 2 tools/score.py --model DIR --input R.jsonl --output S.jsonl"""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.score())
