"""The options of an engine server, in a separate module because importing vLLM takes many seconds and `kdrl-serve --help` does
not need it."""

from __future__ import annotations

import argparse
from typing import Any

from kdrl_mcore.rollout.vllm.gpu_memory import ENGINE_SHARE

FLAGS: dict[str, tuple[Any, str]] = {
    "dtype": ("float32", "dtype of the weights: float32 or bfloat16"),
    "max_model_len": (2048, "prompt and response tokens together; never more than the model supports"),
    "max_sequences": (256, "responses decoded at once"),
    "tensor": (1, "GPUs (or processes on CPU) that split each layer"),
    "seed": (1, "the engine's seed; each request has its own"),
    "gpu_memory_utilization": (ENGINE_SHARE, "share of each GPU"),
    "kv_cache_gib": (1.0, "KV cache on CPU, GiB"),
    "lora_rank": (0, "the largest rank of adapters, which come with a refit and without which nothing is sampled; 0: none"),
    "return_experts": (0, "1: responses come with the experts that routers chose, for mixtures on CUDA"),
    "load_format": ("auto", "auto, or dummy if the weights come with a refit"),
}
"""The options that are fields of `adapter.EngineSettings`: default and help."""


def parser() -> argparse.ArgumentParser:
    """The parser of `kdrl-serve` and of `python -m kdrl_mcore.rollout.vllm.server`."""
    result = argparse.ArgumentParser(
        prog="kdrl-serve",
        description="Serve one vLLM engine over HTTP. Trainers start their own servers; on other nodes you start them.",
    )
    result.add_argument("--run-dir", required=True, help="the run directory; the address goes to RUN/servers/INDEX.json")
    result.add_argument("--index", type=int, required=True, help="the engine's number in the run, from 0")
    result.add_argument("--model", required=True, help="HF model directory")
    result.add_argument(
        "--host", default="127.0.0.1", help="address to bind to: loopback, or the job's interface (%(default)s)"
    )
    result.add_argument("--port", type=int, default=0, help="0: any free port")
    result.add_argument("--parent", type=int, default=0, help="process id of the parent; the server ends when it ends")
    result.add_argument(
        "--vocabulary",
        dest="vocab_size",
        type=int,
        default=0,
        help="number of tokens that may be sampled; 0: all of the tokenizer",
    )
    result.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of vLLM's engine; may be repeated",
    )
    for name, (default, text) in FLAGS.items():
        result.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text} (%(default)s)")
    return result
