"""The process of `kdrl-serve-teacher` in which vLLM's server runs: python -m kdrl_mcore.cli.vllm_serve PARENT [options].

It ends with all processes that vLLM starts when its parent ends, for whatever reason.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from runpy import run_module

import psutil

from kdrl_mcore.rollout.vllm.client import kill_group

WATCH_SECONDS = 0.5
"""The time between two looks at the parent."""


def end_group_with(pid: int) -> None:
    """Kill this process's group soon after the process `pid` ends."""
    while psutil.pid_exists(pid) and os.getppid() == pid:
        time.sleep(WATCH_SECONDS)
    kill_group(os.getpgrp())


def main(arguments: list[str]) -> None:
    """Run vLLM's server, which reads `sys.argv`."""
    parent, *sys.argv[1:] = arguments
    threading.Thread(target=end_group_with, args=(int(parent),), daemon=True).start()
    run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
