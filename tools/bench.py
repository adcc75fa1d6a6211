"""The benchmarks: `python tools/bench.py --help`; they live in `benchmarks/`."""

import sys

from benchmarks.bench import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
