"""`python -m kdrl_mcore.cli NAME ...` runs the command kdrl-NAME; torchrun starts ranks this way."""

import sys

from kdrl_mcore.cli import commands

NAMES = ("train", "evaluate", "score", "convert", "study", "report", "plan", "preflight", "serve", "serve-teacher", "slurm")


if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in NAMES:
        sys.exit(f"error: name one of the commands: {', '.join(NAMES)}")
    sys.argv[0] = f"kdrl-{name}"
    sys.exit(getattr(commands, name.replace("-", "_"))())
