"""`kdrl-report` in a checkout: python tools/report.py RUN [RUN ...] --output report.html"""

import sys

from kdrl_mcore.cli import commands

if __name__ == "__main__":
    sys.exit(commands.report())
