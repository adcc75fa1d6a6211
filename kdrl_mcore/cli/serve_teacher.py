"""Serve a teacher to training jobs: by vLLM for its log-probs and those of its top k, or by our own scorer for everything (it
returns hidden states).

kdrl-serve-teacher --model HF_DIR --run-dir RUN [--kind hidden_states] [options] [options of vllm serve]

With --run-dir the address goes to RUN/teachers/NAME-INDEX.json once the server answers, where `teacher.server` finds it. Every
request needs `Authorization: Bearer TOKEN`; the token is that of KDRL_TEACHER_TOKEN, or with --run-dir a new one.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

import httpx
import torch

from kdrl_mcore.cli.ranks import launch
from kdrl_mcore.convert.fingerprint import weights_fingerprint
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.resilience.interrupt import INTERRUPTED_EXIT_CODE, block_ignored_stop_signals
from kdrl_mcore.rollout.vllm.client import kill_group
from kdrl_mcore.teacher.addresses import TOKEN_VARIABLE, write_address
from kdrl_mcore.teacher.servers import FINGERPRINT

POLL_SECONDS = 0.5
"""The time between two looks at the server."""
KINDS = ("completions", "hidden_states")
MODEL_NAME = "teacher"
"""The model's name on the server."""


def parser() -> argparse.ArgumentParser:
    """The parser of `kdrl-serve-teacher`."""
    result = argparse.ArgumentParser(
        prog="kdrl-serve-teacher",
        description="Serve a teacher over HTTP. With --kind completions further options are those of `vllm serve`.",
    )
    result.add_argument("--model", required=True, help="HF model directory, or a hub id")
    result.add_argument("--kind", default="completions", choices=KINDS, help="as teacher.server.kind (%(default)s)")
    result.add_argument("--run-dir", type=Path, help="the run directory of the training job")
    result.add_argument("--name", default="teacher", help="the teacher's name in `teachers` (%(default)s: the only one)")
    result.add_argument("--index", type=int, default=0, help="the server's number among those of the teacher, from 0")
    result.add_argument("--host", default="127.0.0.1", help="address to bind to (%(default)s)")
    result.add_argument("--port", type=int, default=0, help="0: any free port")
    result.add_argument("--tensor", type=int, default=1, help="GPUs (or processes on CPU) that split each layer (%(default)s)")
    result.add_argument("--dtype", default="bfloat16", help="type of the weights: bfloat16 or float32 (%(default)s)")
    result.add_argument(
        "--max-model-len", type=int, help="prompt and response tokens together, and one more; at most the model's"
    )
    result.add_argument("--max-logprobs", type=int, default=64, help="vLLM: the largest objective.kd.top_k (%(default)s)")
    result.add_argument("--vocabulary", type=int, default=0, help="hidden_states: columns that count; 0: the tokenizer's")
    result.add_argument(
        "--step-tokens",
        type=int,
        default=4096,
        help="tokens of a forward pass, whose logits are held in float32 beside weights and KV cache (%(default)s)",
    )
    result.add_argument("--gpu-memory-utilization", type=float, default=0.8, help="vLLM: share of each GPU (%(default)s)")
    result.add_argument("--kv-cache-gib", type=float, default=1.0, help="vLLM: KV cache on CPU, GiB (%(default)s)")
    return result


def main(arguments: list[str]) -> int:
    """Serve until asked to stop, or until the server ends; returns the exit code."""
    options, further = parser().parse_known_args(arguments)
    try:
        return _serve_states(options, arguments, further) if options.kind == "hidden_states" else _serve(options, further)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _token(options: argparse.Namespace) -> str | None:
    """The token that the server requires; None on an address that cannot be reached from elsewhere."""
    token = os.environ.get(TOKEN_VARIABLE) or (secrets.token_urlsafe(32) if options.run_dir else None)
    if token is None and not _is_loopback(options.host):
        raise ConfigError(f"--host {options.host} can be reached from elsewhere: set {TOKEN_VARIABLE}, or name --run-dir")
    return token


def _serve_states(options: argparse.Namespace, arguments: list[str], further: list[str]) -> int:
    """Start a rank for each GPU of the server, and wait until they end."""
    if further:
        raise ConfigError(f"--kind hidden_states has no option {further[0]} (--help lists the options)")
    token = _token(options)
    if token is not None:
        os.environ[TOKEN_VARIABLE] = token
    block_ignored_stop_signals()
    return launch(options.tensor, [sys.executable, "-u", "-m", "kdrl_mcore.cli.serve_states", *arguments])


def _serve(options: argparse.Namespace, further: list[str]) -> int:
    """Start vLLM's server, and wait until it ends."""
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed: pip install 'kdrl-mcore[vllm]'")
    token = _token(options)
    port = options.port or _free_port(options.host)
    environment = dict(os.environ) if token is None else {**os.environ, "VLLM_API_KEY": token}
    command = [sys.executable, "-m", "kdrl_mcore.cli.vllm_serve", str(os.getpid()), *vllm_arguments(options, port), *further]
    block_ignored_stop_signals()  # vLLM sets its own handlers
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    url = f"http://{options.host}:{port}"
    previous = signal.getsignal(signal.SIGTERM)
    if previous != signal.SIG_IGN:  # a launcher may have made the server survive it
        signal.signal(signal.SIGTERM, _stop)
    try:
        _announce(server, options, url, token)
        code = server.wait()
        print(f"error: the server ended with exit code {code}", file=sys.stderr, flush=True)
        return 1
    except (KeyboardInterrupt, _Stopped):
        return INTERRUPTED_EXIT_CODE
    finally:
        kill_group(server.pid)
        server.wait()


def vllm_arguments(options: argparse.Namespace, port: int) -> list[str]:
    """The arguments of vLLM's server for these options."""
    names = [MODEL_NAME]
    if (fingerprint := weights_fingerprint(options.model)) is not None:
        names.append(f"{FINGERPRINT}{fingerprint[:16]}")
    words = ["--model", options.model, "--served-model-name", *names, "--host", options.host, "--port", str(port)]
    words += ["--tensor-parallel-size", str(options.tensor), "--dtype", options.dtype]
    words += ["--max-logprobs", str(options.max_logprobs), "--max-num-batched-tokens", str(options.step_tokens)]
    words += ["--gpu-memory-utilization", str(options.gpu_memory_utilization), "--disable-uvicorn-access-log"]
    if not torch.cuda.is_available():
        words += ["--kv-cache-memory-bytes", str(int(options.kv_cache_gib * 2**30))]
    if options.max_model_len is None:
        return words
    is_here = Path(options.model).is_dir()
    most = min(options.max_model_len, read_architecture(options.model).context_length) if is_here else options.max_model_len
    return [*words, "--max-model-len", str(most)]


def _announce(server: subprocess.Popen[bytes], options: argparse.Namespace, url: str, token: str | None) -> None:
    """Write the address once the server answers, or has ended."""
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=10, trust_env=False).status_code == httpx.codes.OK:
                break
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    else:
        return
    if options.run_dir is not None:
        write_address(options.run_dir, options.name, options.index, url, token)
    print(f"the teacher {options.model} is served at {url}", flush=True)


class _Stopped(Exception):
    """The process was asked to stop."""


def _stop(*_: object) -> None:
    raise _Stopped


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
