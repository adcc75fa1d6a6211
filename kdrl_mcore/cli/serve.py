"""Serve a vLLM engine for trainers on other nodes.

kdrl-serve --run-dir RUN --index 0 --model HF_DIR [options]
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from kdrl_mcore.rollout.vllm.options import parser


def main(arguments: list[str]) -> int:
    """Serve until asked to stop; returns the exit code. vLLM is imported only after the options have been read."""
    options = parser().parse_args(arguments)
    if find_spec("vllm") is None:
        print("error: vLLM is not installed: pip install 'kdrl-mcore[vllm]'", file=sys.stderr)
        return 2
    from kdrl_mcore.rollout.vllm.server import serve

    return serve(options)
