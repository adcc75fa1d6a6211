"""`kdrl-study` in a checkout: python tools/experiments.py conf/study/main.yaml"""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.study())
