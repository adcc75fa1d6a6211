"""`kdrl-plan` in a checkout: python tools/plan.py experiment=kdrl_32b cluster=h100 cluster.nodes=16"""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.plan())
