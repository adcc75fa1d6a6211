"""`kdrl-convert` in a checkout: python tools/convert_hf.py import --hf DIR --output CKPT"""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.convert())
