"""Stands in for `python -m MODULE tools.gpu_check --stage NAME ...`: one stage answers, one fails, one hangs."""

from __future__ import annotations

import json
import sys
import time

stage = sys.argv[sys.argv.index("--stage") + 1]
if stage == "matrices":
    print("a line of somebody else's")
    print("RESULT " + json.dumps({"bfloat16_tflops": 500.0, "details": {"runs": 5}}))
elif stage == "head":
    sys.exit("the kernel does not compile")
else:
    time.sleep(600)
