"""`python tools/bench.py teacher`: the throughput of a teacher in the job and of the same one on servers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.help import Defaults
from benchmarks.step import PAIRS, WIDTH, write_pair
from kdrl_mcore.config import Config, ModelConfig, TeacherConfig, TeacherServerConfig
from kdrl_mcore.config.derived import DISTRIBUTION, LOG_PROBS
from kdrl_mcore.errors import ConfigError, TeacherError
from kdrl_mcore.resilience.files import write_file
from kdrl_mcore.types import Rollout

STARTUP_SECONDS = 900.0
"""How long a server may take to start."""
IN_JOB = "in the job, log-probs"
"""The variant with which the others are compared."""

Work = Callable[[], object]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "teacher",
        help="the throughput of a teacher in the job and on servers",
        description="Scores the same responses with a teacher in the job, with a server of hidden states and, if vLLM is "
        "installed, with its server (log-probs of the sampled tokens, and of the top k), in turn. Everything runs on this "
        "machine.",
        formatter_class=Defaults,
    )
    parser.add_argument("--pair", default="tiny", choices=list(PAIRS), help="the random teacher of this pair")
    parser.add_argument("--responses", type=int, default=64, help="responses to score")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of a response")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens before a response")
    parser.add_argument("--top-k", type=int, default=16, help="most likely tokens to ask vLLM for")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every variant, taken in turn; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single time to this file")


def run(options: argparse.Namespace) -> None:
    """Measure every variant in turn.

    Raises:
        ConfigError: an option is wrong.
        TeacherError: a server failed.
    """
    for name in ("responses", "tokens", "prompt_tokens", "top_k", "repeats"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1")
    from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

    prepare_platform()
    created = initialize_distributed(timeout_minutes=30)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdrl_bench_")))
        write_pair(folder, options.pair)
        variants = dict(_variants(folder, options, stack))
        for work in variants.values():
            work()  # fills caches
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name, work in variants.items():
                begin = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begin)
    console.print(table(options, seconds))
    if importlib.util.find_spec("vllm") is None:
        console.print("Not measured: vLLM's server: vLLM is not installed.")
    if created:
        torch.distributed.destroy_process_group()
    if options.json is not None:
        write_file(options.json, json.dumps(seconds, indent=1) + "\n")


def _variants(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Iterator[tuple[str, Work]]:
    """Each variant by its name; servers run until the stack closes."""
    from kdrl_mcore.data.vocabulary import shared_vocabulary
    from kdrl_mcore.teacher.addresses import wait_for_addresses
    from kdrl_mcore.teacher.completions import CompletionServers
    from kdrl_mcore.teacher.connect import expected_of
    from kdrl_mcore.teacher.servers import ScoringServers
    from kdrl_mcore.teacher.state_servers import StateServers
    from kdrl_mcore.teacher.teacher import Teacher

    path = str(folder / "teacher")
    tokenizer, columns = shared_vocabulary(path)
    teacher = Teacher(path, TeacherConfig(offload=False), ModelConfig(dtype="float32"), 1, columns)
    rollouts = make_rollouts(options, columns)
    job = partial(teacher.scores_of, dict(enumerate(rollouts)), temperature=1.0, micro_tokens=4096)
    yield IN_JOB, partial(job, frozenset({LOG_PROBS}))
    yield "in the job, hidden states", partial(job, frozenset({DISTRIBUTION}))

    config, server = Config(), TeacherServerConfig(startup_timeout=STARTUP_SECONDS)
    config.run.dir, config.rollout.engine = str(folder), "replay"  # the lengths are those of the responses
    has_vllm = importlib.util.find_spec("vllm") is not None
    kinds = {"hidden_states": (), **({"completions": ("--kv-cache-gib", "0.5")} if has_vllm else {})}
    limit = str(options.prompt_tokens + options.tokens + 1)
    processes = {}
    for kind, more in kinds.items():
        more = (*more, "--dtype", "float32", "--max-logprobs", str(options.top_k), "--max-model-len", limit)
        command = ["--model", path, "--run-dir", str(folder), "--kind", kind, "--name", kind, *more]
        processes[kind] = stack.enter_context(started(command))
    for kind in kinds:
        addresses = dict(wait_for_addresses(config, kind, server, partial(_check_runs, processes[kind])))

        def find(found: dict[str, str | None] = addresses) -> dict[str, str | None]:
            return found

        clients: dict[str, tuple[ScoringServers, str]] = {}
        if kind == "hidden_states":
            states = StateServers(find, temperature=1.0, columns=columns, hidden_size=None)
            clients = {"server, log-probs": (states, LOG_PROBS), "server, hidden states": (states, DISTRIBUTION)}
        else:
            clients["vLLM, log-probs"] = CompletionServers(find), LOG_PROBS
            clients[f"vLLM, top {options.top_k}"] = CompletionServers(find, top_k=options.top_k), DISTRIBUTION
        for name, (client, wanted) in clients.items():
            stack.callback(client.close)
            client.wait(STARTUP_SECONDS)
            client.check(expected_of(config, kind, tokenizer, columns, (), None))
            yield name, partial(client.score, rollouts, frozenset({wanted}))


def _check_runs(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        raise TeacherError("a server ended while it started")


@contextmanager
def started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server of `kdrl-serve-teacher` that runs inside, with its output only if it fails.

    Raises:
        TeacherError: it ended by itself.
    """
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        command = [sys.executable, "-m", "kdrl_mcore.cli", "serve-teacher", *arguments]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            ended = process.poll()
            process.terminate()
            process.wait()
            if ended is not None:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise TeacherError(f"kdrl-serve-teacher ended with exit code {ended}: {lines[-1] if lines else ''}")


def make_rollouts(options: argparse.Namespace, columns: int) -> list[Rollout]:
    """Random responses."""
    draw = np.random.default_rng(0)
    return [
        Rollout(
            f"p{index}",
            index,
            draw.integers(columns, size=options.prompt_tokens),
            draw.integers(columns, size=options.tokens),
            np.zeros(options.tokens, np.float32),
            "length",
            0,
        )
        for index in range(options.responses)
    ]


def table(options: argparse.Namespace, seconds: dict[str, list[float]]) -> Table:
    """Response tokens a second of every variant, and how it compares with the teacher in the job."""
    tokens, plain = options.responses * options.tokens, median(seconds[IN_JOB])
    title = f"{options.pair} teacher, {options.responses} responses of {options.tokens} tokens"
    result = Table(title=title, title_justify="left")
    for name in ("variant", "time", "response tokens / s", "/ in the job"):
        result.add_column(name, justify="left" if name == "variant" else "right")
    for name, times in seconds.items():
        taken = median(times)
        result.add_row(name, f"{taken:.3f} s", f"{tokens / taken:.0f}", f"{taken / plain:.2f}")
    return result
