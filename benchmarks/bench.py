"""Benchmarks: `python tools/bench.py vocab-parallel` compares ways to compute loss and gradients of the output head, `convert`
compares checkpoint conversion and `refit` a refit with a plain copy, `step` compares KDRL with GRPO, `memory` the memory of
ranks with the plan, `peers` a whole step with TRL's and a plain loop's, `generate` the embedded engine with transformers and
vLLM, and `teacher` a teacher on servers with one in the job."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import convert as bench_convert
from benchmarks import generate as bench_generate
from benchmarks import memory as bench_memory
from benchmarks import peers as bench_peers
from benchmarks import refit as bench_refit
from benchmarks import step as bench_step
from benchmarks import teacher as bench_teacher
from benchmarks.head import DIVERGENCES, VARIANTS, Problem, Ranks, Reference
from benchmarks.help import Defaults
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.resilience.files import write_file

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""The largest allowed difference of losses and gradients, relative to the largest element."""
WIDTH = 120
"""The width of a table if the output is not a terminal."""
MATERIALISED_COPIES = {
    "k2": 5,
    "exact": 8,
    "forward": 8,
    "jensen_shannon": 15,
    "top_k_bucket": 8,
    "top_k_corrected": 7,
    "top_k_jsd": 8,
    "eopd": 7,
}
"""The number of float32 [T, V] tensors that the materialised variant holds; used to check the memory before it runs."""


@dataclass(frozen=True)
class Measurement:
    """One variant on one problem.

    Attributes:
        seconds: the wall-clock time of the slowest rank, the median of the repeats.
        cpu_seconds: the CPU time of a rank's process, likewise. On an idle machine about seconds times threads; on a busy one
            the better measure.
        all_seconds, all_cpu_seconds: both for each repeat.
        extra_bytes: the peak memory above the inputs on the largest rank, gradients included.
        difference: the largest difference of loss, dX or dW from the first variant's, relative to the largest element; None for
            that variant itself and for the bare products.
    """

    variant: str
    seconds: float
    cpu_seconds: float
    all_seconds: list[float]
    all_cpu_seconds: list[float]
    extra_bytes: float
    difference: float | None


def main(arguments: list[str]) -> int:
    """Run a sub-command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure parts of kdrl_mcore and compare them with the alternatives.")
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser(
        "vocab-parallel",
        help="loss and gradients of the output head",
        description="Materialised logits, chunks with recompute, the fused head and the bare matrix products, on the same "
        "inputs in one run: time, peak memory and equality of the results, for every combination of tokens, vocabulary and "
        "ranks.",
        formatter_class=Defaults,
    )
    head.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="loss rows")
    head.add_argument("--hidden", type=int, default=512, help="hidden size of student and teacher")
    head.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936], help="columns of all ranks together")
    head.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="ranks that share the vocabulary, one process each")
    head.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE), help="type of hidden states and weight")
    head.add_argument("--estimator", default="k2", choices=tuple(DIVERGENCES), help="divergence from the teacher in the loss")
    head.add_argument("--repeats", type=int, default=3, help="timed runs of each variant, taken in turn; the median counts")
    head.add_argument("--threads", type=int, help="CPU threads of all ranks together (default: one per core)")
    head.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file")
    bench_convert.add_parser(commands)
    bench_refit.add_parser(commands)
    bench_step.add_parser(commands)
    bench_memory.add_parser(commands)
    bench_peers.add_parser(commands)
    bench_generate.add_parser(commands)
    bench_teacher.add_parser(commands)
    options = parser.parse_args(arguments)
    runs = {
        "vocab-parallel": vocab_parallel,
        "convert": bench_convert.run,
        "refit": bench_refit.run,
        "step": bench_step.run,
        "memory": bench_memory.run,
        "peers": bench_peers.run,
        "generate": bench_generate.run,
        "teacher": bench_teacher.run,
    }
    try:
        runs[options.command](options)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def vocab_parallel(options: argparse.Namespace) -> None:
    """Measure every problem in turn.

    Raises:
        ConfigError: an option is wrong.
        KdrlError: a variant failed, or the variants disagree.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = options.threads or len(os.sched_getaffinity(0))
    problems = [
        Problem(
            tokens, options.hidden, vocab, tp, options.dtype, options.estimator, device, threads=max(1, threads // max(1, tp))
        )
        for tp, vocab, tokens in product(options.tp, options.vocab, options.tokens)
    ]
    for problem in problems:
        _check(problem, options.repeats)
    console, report = Console(width=None if sys.stdout.isatty() else WIDTH), []
    for problem in problems:
        measured = measure(problem, options.repeats, console)
        console.print(table(problem, measured))
        report.append({"problem": asdict(problem), "measured": [asdict(one) for one in measured]})
        wrong = [one for one in measured if one.difference is not None and not one.difference <= TOLERANCE[problem.dtype]]
        if options.json is not None:
            write_file(options.json, json.dumps(report, indent=1) + "\n")
        if wrong:
            raise KdrlError(
                f"{wrong[0].variant} differs from {measured[0].variant} by {wrong[0].difference:.1e}, more than "
                f"{TOLERANCE[problem.dtype]:.0e}: its times are meaningless"
            )


def measure(problem: Problem, repeats: int, console: Console) -> list[Measurement]:
    """Measure all variants on one problem: memory and equality in the first run of each, then the times in turn."""
    names = [name for name in VARIANTS if name != "materialised" or _fits(problem, console)]
    references = [Reference.empty(problem) for _ in range(problem.tp)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdrl_bench_")))
        ranks: dict[str, Ranks] = {}
        for name in names:
            ranks[name] = Ranks(name, problem, references, folder)
            stack.callback(ranks[name].close)
        status = stack.enter_context(console.status(""))
        status.update(f"{_title(problem)}: first runs")
        first = {name: ranks[name].ask("publish" if name == names[0] else "first") for name in names}
        runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in names}
        for repeat in range(repeats):
            for name in names:
                status.update(f"{_title(problem)}: {name}, {repeat + 1} of {repeats}")
                runs[name].append(ranks[name].ask("time"))
    return [_measurement(name, first[name], runs[name]) for name in names]


def _measurement(variant: str, first: list[dict[str, float]], runs: list[list[dict[str, float]]]) -> Measurement:
    """The measurement from the first answers of all ranks, and from their answers in each repeat."""
    seconds, cpu_seconds = ([max(rank[key] for rank in run) for run in runs] for key in ("seconds", "cpu_seconds"))
    differences = [rank["difference"] for rank in first if "difference" in rank]
    return Measurement(
        variant,
        median(seconds),
        median(cpu_seconds),
        seconds,
        cpu_seconds,
        max(rank["extra_bytes"] for rank in first),
        max(differences, default=None),
    )


def table(problem: Problem, measured: list[Measurement]) -> Table:
    """The measurements of one problem, and their ratios to the bare products and to the materialised variant."""
    by_name = {one.variant: one for one in measured}
    bare, materialised = by_name["bare products"], by_name.get("materialised")
    result = Table(title=_title(problem), title_justify="left")
    result.add_column("variant", no_wrap=True)
    for name in ("time", "/ bare", "/ mat.", "CPU time", "/ bare", "/ mat.", "TFLOP/s", "extra memory", "/ mat.", "difference"):
        result.add_column(name, justify="right")
    for one in measured:
        result.add_row(
            one.variant,
            f"{one.seconds:.3f} s",
            f"{one.seconds / bare.seconds:.2f}",
            "-" if materialised is None else f"{one.seconds / materialised.seconds:.2f}",
            f"{one.cpu_seconds:.3f} s",
            f"{one.cpu_seconds / bare.cpu_seconds:.2f}",
            "-" if materialised is None else f"{one.cpu_seconds / materialised.cpu_seconds:.2f}",
            f"{problem.flop / one.seconds / 1e12:.3f}",
            f"{one.extra_bytes / 2**20:.0f} MiB",
            "-" if materialised is None else f"1/{materialised.extra_bytes / max(one.extra_bytes, 1.0):.1f}",
            "-" if one.difference is None else f"{one.difference:.1e}",
        )
    return result


def _check(problem: Problem, repeats: int) -> None:
    for name in ("tokens", "hidden", "vocab", "tp", "threads"):
        if getattr(problem, name) < 1:
            raise ConfigError(f"--{name} is {getattr(problem, name)}: it must be at least 1")
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}: it must be at least 1")
    if problem.vocab % problem.tp:
        raise ConfigError(f"--vocab {problem.vocab} cannot be shared by --tp {problem.tp} ranks: it must divide evenly")
    if problem.device == "cuda" and torch.cuda.device_count() < problem.tp:
        raise ConfigError(f"--tp {problem.tp} needs {problem.tp} GPUs, but this machine has {torch.cuda.device_count()}")


def _fits(problem: Problem, console: Console) -> bool:
    """Whether there is enough memory for the materialised variant; prints a line if not."""
    ranks = 1 if problem.device == "cuda" else problem.tp
    needed = MATERIALISED_COPIES[problem.estimator] * 4 * problem.tokens * (problem.vocab // problem.tp) * ranks
    available = torch.cuda.mem_get_info()[0] if problem.device == "cuda" else psutil.virtual_memory().available
    if needed > available:
        console.print(
            f"{_title(problem)}: materialised is left out, as it needs about {needed / 2**30:.0f} GiB and only "
            f"{available / 2**30:.0f} GiB are free"
        )
    return needed <= available


def _title(problem: Problem) -> str:
    return (
        f"T {problem.tokens}, H {problem.hidden}, V {problem.vocab}, tp {problem.tp}, {problem.dtype}, {problem.estimator}, "
        f"{problem.device} with {problem.threads} thread{'s' if problem.threads > 1 else ''} per rank"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
