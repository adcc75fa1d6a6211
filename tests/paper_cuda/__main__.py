"""`[torchrun --nproc-per-node N] -m tests.paper_cuda MODULE ARGUMENTS`: run a module on paper CUDA and print its costs."""

from __future__ import annotations

import runpy
import sys

from tests.paper_cuda import install


def main() -> None:
    """Run `sys.argv[1]` as `__main__`, then print this rank's host syncs by line and its peak memory by phase."""
    install()
    from tests.paper_cuda.memory import ledger
    from tests.paper_cuda.syncs import syncs

    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        print("host syncs", *(f"{count:6} {where}" for where, count in syncs.most_common(30)), sep="\n", file=sys.stderr)
        print(f"peak {ledger.peak / 2**20:.1f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
