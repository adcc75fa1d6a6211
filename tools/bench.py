"""Benchmarks: `python tools/bench.py vocab-parallel` compares ways to compute loss and gradients of the output head,
`python tools/bench.py convert` checkpoint conversion, and `refit` a refit, with a plain copy; `step` KDRL with GRPO,
`memory` what ranks hold with the plan."""

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

from kdrl_mcore.errors import ConfigError, KdrlError
from tools import bench_convert, bench_memory, bench_refit, bench_step
from tools.bench_vocab_parallel import VARIANTS, Problem, Ranks, Reference
from tools.help import Defaults

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of losses and gradients, relative to the largest element."""
WIDTH = 120
"""Of a table that is not shown on a terminal."""
MATERIALISED_COPIES = {"k2": 5, "exact": 8}
"""How many float32 [T, V] the materialised variant needs room for; checked before it is run."""


@dataclass(frozen=True)
class Measurement:
    """One variant on one problem.

    Attributes:
        seconds: the median of the repeats, of the slowest rank.
        cpu_seconds: likewise, of the CPU time of a rank's process. On a quiet machine about seconds times threads; where others
            compute as well, the better measure.
        extra_bytes: peak memory above the inputs, of the largest rank; the gradients are part of it.
        difference: largest difference of loss, dX or dW to the first variant's, relative to the largest element; None for that
            variant itself and for the bare products.
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
    parser = argparse.ArgumentParser(description="Measure parts of kdrl_mcore beside the alternatives.")
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser(
        "vocab-parallel",
        help="loss and gradients of the output head",
        description="Materialised logits, chunks with recompute, the fused head and the bare matrix products, on the same "
        "inputs in one run: time, peak memory and equality, for every combination of tokens, vocabulary and ranks.",
        formatter_class=Defaults,
    )
    head.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="loss rows")
    head.add_argument("--hidden", type=int, default=512, help="hidden size, of student and teacher")
    head.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936], help="columns of all ranks together")
    head.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="ranks that share the vocabulary, a process each")
    head.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE), help="of hidden states and weight")
    head.add_argument("--estimator", default="k2", choices=("k2", "exact"), help="of the reverse KL in the loss")
    head.add_argument("--repeats", type=int, default=3, help="timed runs of each variant, taken in turn; the median counts")
    head.add_argument("--threads", type=int, help="CPU threads of all ranks together (default: one for each core)")
    head.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there as well")
    bench_convert.add_parser(commands)
    bench_refit.add_parser(commands)
    bench_step.add_parser(commands)
    bench_memory.add_parser(commands)
    options = parser.parse_args(arguments)
    runs = {
        "vocab-parallel": vocab_parallel,
        "convert": bench_convert.run,
        "refit": bench_refit.run,
        "step": bench_step.run,
        "memory": bench_memory.run,
    }
    try:
        runs[options.command](options)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def vocab_parallel(options: argparse.Namespace) -> None:
    """Every problem in turn.

    Raises:
        ConfigError: an option is wrong.
        KdrlError: a variant failed, or variants disagree.
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
            aside = options.json.with_name(options.json.name + ".part")
            aside.write_text(json.dumps(report, indent=1) + "\n")
            aside.replace(options.json)
        if wrong:
            raise KdrlError(
                f"{wrong[0].variant} differs from {measured[0].variant} by {wrong[0].difference:.1e}, more than "
                f"{TOLERANCE[problem.dtype]:.0e}: its times mean nothing"
            )


def measure(problem: Problem, repeats: int, console: Console) -> list[Measurement]:
    """All variants on one problem: the first run of each for memory and equality, then in turn for time."""
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
    """From the answers of each rank, and of each rank in each repeat."""
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
    """One problem's measurements and their ratios to the bare products and to the materialised variant."""
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
        raise ConfigError(f"--tp {problem.tp} needs as many GPUs and this machine has {torch.cuda.device_count()}")


def _fits(problem: Problem, console: Console) -> bool:
    """Whether there is memory for the materialised variant; says so if not."""
    ranks = 1 if problem.device == "cuda" else problem.tp
    needed = MATERIALISED_COPIES[problem.estimator] * 4 * problem.tokens * (problem.vocab // problem.tp) * ranks
    available = torch.cuda.mem_get_info()[0] if problem.device == "cuda" else psutil.virtual_memory().available
    if needed > available:
        console.print(
            f"{_title(problem)}: materialised is left out, it needs about {needed / 2**30:.0f} GiB and "
            f"{available / 2**30:.0f} GiB are free"
        )
    return needed <= available


def _title(problem: Problem) -> str:
    return (
        f"T {problem.tokens}, H {problem.hidden}, V {problem.vocab}, tp {problem.tp}, {problem.dtype}, {problem.estimator}, "
        f"{problem.device} with {problem.threads} thread{'s' if problem.threads > 1 else ''} a rank"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
