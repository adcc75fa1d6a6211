"""Plan a run before it is queued: memory of every rank, time of an iteration, cost, and advice.

    kdrl-plan experiment=kdrl_32b cluster=h100 cluster.nodes=16 [key=value ...]
    kdrl-plan --search experiment=kdrl_32b cluster=h100

The overrides are those of kdrl-train. A model is a directory with a config.json, or the name of a published one.
docs/planning.md has every equation; kdrl-study makes many plans at once, over cluster and model sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdrl_mcore.config import add_config_options, config_arguments, load_config
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.planning.advice import advise
from kdrl_mcore.planning.memory import GIB, PHASES
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.savings import Saving, savings
from kdrl_mcore.planning.search import Candidate, search
from kdrl_mcore.planning.setup import make_setup
from kdrl_mcore.planning.summary import to_json
from kdrl_mcore.planning.workload import workload_of
from kdrl_mcore.studies.results import replace_file

WIDTH = 140
"""Width of tables that are not printed to a terminal."""


def main(arguments: list[str]) -> int:
    """Plan or search; returns the exit code, which is also 1 if the plan does not fit."""
    parser = argparse.ArgumentParser(
        prog="kdrl-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt-tokens", type=int, help="mean prompt (default: 256, or the longest allowed)")
    parser.add_argument("--response-tokens", type=int, help="mean response (default: half of the longest allowed)")
    parser.add_argument("--correct", type=float, default=0.6, help="share of correct responses (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help="the best layouts for this number of GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")
    add_config_options(parser)
    options = parser.parse_intermixed_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    try:
        config = load_config(config_arguments(options))
        workload = workload_of(
            config, prompt_tokens=options.prompt_tokens, response_tokens=options.response_tokens, correct=options.correct
        )
        if options.search:
            started = time.monotonic()
            found, looked_at = search(config, workload)
            show_search(console, found, looked_at, time.monotonic() - started)
            return 0 if found else 1
        plan = make_plan(make_setup(config, workload))
        if options.json is not None:
            replace_file(options.json, to_json(plan))
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(console, plan)
    return 0 if plan.fits else 1


def show(console: Console, plan: Plan) -> None:
    """Print the whole plan as tables."""
    setup = plan.setup
    student, cluster, workload = setup.student, setup.cluster, setup.workload
    layout = student.layout
    console.print(
        f"{setup.config.student.path} ({student.parameters / 1e9:.2f}B) on {setup.gpus} x {cluster.name}: tensor "
        f"{layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {layout.data}"
    )
    if setup.engine is not None:
        where = f"on {setup.engine_gpus} separate GPUs" if setup.engine_gpus else "on the same GPUs in turn"
        engines = setup.engine.layout
        console.print(f"vLLM: {engines.data} engines of {engines.tensor} GPUs, {where}")
    console.print(
        f"assumed: {workload.responses} responses of {workload.response_tokens} tokens (longest {workload.longest}) to prompts "
        f"of {workload.prompt_tokens}, {workload.correct:.0%} correct"
    )
    console.print(_memory_table(plan))
    if plan.checkpoint_host_bytes:
        console.print(
            f"a checkpoint takes {plan.checkpoint_host_bytes / GIB:.1f} GiB of each node's host memory until it is written"
        )
    if plan.teacher_host_bytes:
        console.print(f"off-loaded teachers take {plan.teacher_host_bytes / GIB:.1f} GiB of each node's host memory")
    if plan.activation_host_bytes:
        console.print(f"off-loaded activations take {plan.activation_host_bytes / GIB:.1f} GiB of each node's host memory")
    console.print(_time_table(plan))
    if plan.hidden:
        console.print(f"{plan.hidden:.1f} s of these are hidden: servers sample meanwhile")
    console.print(
        f"{plan.seconds:.1f} s per iteration, {plan.tokens_per_gpu_second:.0f} tokens/s/GPU; {setup.config.trainer.steps} "
        f"iterations: {plan.gpu_hours:.0f} GPU-hours, {plan.cost:.0f} USD"
    )
    console.print(_savings_table(savings(plan)))
    for line in advise(plan):
        console.print(escape(line))  # lists of modules are in brackets


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of a rank, GiB", title_justify="left")
    table.add_column("kind")
    for rank in plan.memory:
        table.add_column(f"{rank.name}\n{rank.ranks}", justify="right")
    kinds = list(dict.fromkeys((item.kind, item.phases) for rank in plan.memory for item in rank.items))
    for kind, phases in kinds:
        cells = [sum(item.bytes for item in rank.items if item.kind == kind) for rank in plan.memory]
        when = f" ({', '.join(phases)})" if phases else ""
        table.add_row(f"{kind}{when}", *(f"{size / GIB:.2f}" for size in cells))
    table.add_section()
    for phase in PHASES:
        table.add_row(f"in all: {phase}", *(f"{rank.at(phase) / GIB:.2f}" for rank in plan.memory))
    table.add_section()
    table.add_row("peak", *(f"{rank.peak / GIB:.1f} {'' if rank.fits else 'TOO MUCH'}" for rank in plan.memory))
    table.add_row("can be used", *(f"{(rank.capacity or 0) / GIB:.1f}" for rank in plan.memory))
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="Time of one iteration", title_justify="left")
    for name in ("phase", "seconds", "share", "ruled by", "of which"):
        table.add_column(name, justify="right" if name in ("seconds", "share") else "left")
    for phase in plan.phases:
        seconds = phase.seconds
        parts = ", ".join(
            f"{bound} {value:.2f}" for bound, value in sorted(seconds.items(), key=lambda x: -x[1]) if value >= 0.005
        )
        table.add_row(phase.name, f"{seconds.total:.2f}", f"{seconds.total / plan.seconds:.0%}", seconds.bound, parts)
    return table


def _savings_table(rows: list[Saving]) -> Table:
    table = Table(title="What each measure saves here, of an iteration and of the peak", title_justify="left")
    for name in ("measure", "switched by", "is", "time", "memory", "note"):
        table.add_column(name, justify="right" if name in ("time", "memory") else "left")
    for row in rows:
        cells = [
            "-" if row.seconds is None else f"{row.seconds:.1f} s",
            "-" if row.bytes is None else f"{row.bytes / GIB:.1f} GiB",
        ]
        table.add_row(row.name, row.key or "-", "on" if row.on else "off", *cells, row.note)
    return table


def show_search(console: Console, found: list[Candidate], looked_at: int, seconds: float) -> None:
    """Print the best layouts, with reasons."""
    if not found:
        console.print(f"none of {looked_at} layouts fits: take more GPUs, or shorter responses")
        return
    table = Table(title=f"The best of {looked_at} layouts ({seconds:.1f} s)", title_justify="left")
    for name in ("overrides", "s/iteration", "tokens/s/GPU", "peak GiB", "why"):
        table.add_column(name, overflow="fold")
    for candidate in found:
        plan = candidate.plan
        row = f"{plan.seconds:.1f}", f"{plan.tokens_per_gpu_second:.0f}", f"{plan.peak / GIB:.0f}"
        table.add_row(escape(" ".join(candidate.overrides)), *row, candidate.reason)
        table.add_section()
    console.print(table)
