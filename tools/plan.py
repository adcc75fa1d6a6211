"""Plan a run before it is queued: memory of every rank, time of an iteration, cost, and what to change.

    python tools/plan.py experiment=kdrl_32b cluster=h100 cluster.nodes=16 [key=value ...]
    python tools/plan.py --search experiment=kdrl_32b cluster=h100
    python tools/plan.py --study conf/experiments/scaling.yaml --output docs

The overrides are those of kdrl_mcore.train. A model is a directory with a config.json, or the name of a published one. Every
equation is in docs/planning.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.planning.advice import advise, levers
from kdrl_mcore.planning.memory import GIB, PHASES
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.search import Candidate, search
from kdrl_mcore.planning.setup import Choices, make_setup
from kdrl_mcore.planning.study import run_study
from kdrl_mcore.planning.workload import workload_of

WIDTH = 140
"""Of tables that are not shown on a terminal."""


def main(arguments: list[str]) -> int:
    """Plan, search or study; returns the exit code: 1 also where the plan does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, help="mean prompt (default: 256, or the longest allowed)")
    parser.add_argument("--response-tokens", type=int, help="mean response (default: half of the longest allowed)")
    parser.add_argument("--correct", type=float, default=0.6, help="share of correct responses (default: %(default)s)")
    parser.add_argument("--rollout-tensor", type=int, help="GPUs of one vLLM engine (default: parallel.tensor)")
    parser.add_argument("--rollout-gpus", type=int, default=0, help="GPUs of the cluster that only generate (default: none)")
    parser.add_argument("--steps-ahead", type=int, default=0, help="updates that generation may run ahead (default: none)")
    parser.add_argument("--search", action="store_true", help="the best layouts for this number of GPUs")
    parser.add_argument("--study", type=Path, metavar="FILE", help="plan every run of a study; tables and plots")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of a study's result (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    try:
        if options.study:
            for path in run_study(options.study, options.output):
                console.print(f"wrote {path}")
            return 0
        config = load_config(options.overrides)
        workload = workload_of(
            config, prompt_tokens=options.prompt_tokens, response_tokens=options.response_tokens, correct=options.correct
        )
        choices = Choices(options.rollout_tensor, options.rollout_gpus, options.steps_ahead)
        if options.search:
            started = time.monotonic()
            found, looked_at = search(config, workload, choices)
            show_search(console, found, looked_at, time.monotonic() - started)
            return 0 if found else 1
        plan = make_plan(make_setup(config, workload, choices))
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(console, plan)
    return 0 if plan.fits else 1


def show(console: Console, plan: Plan) -> None:
    """The whole plan as tables."""
    setup = plan.setup
    student, cluster, workload = setup.student, setup.cluster, setup.workload
    layout = student.layout
    console.print(
        f"{setup.config.student.path} ({student.parameters / 1e9:.2f}B) on {setup.gpus} x {cluster.name}: tensor "
        f"{layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {layout.data}"
    )
    console.print(
        f"assumed: {workload.responses} responses of {workload.response_tokens} tokens (longest {workload.longest}) to prompts "
        f"of {workload.prompt_tokens}, {workload.correct:.0%} correct"
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(
        f"{plan.seconds:.1f} s per iteration, {plan.tokens_per_gpu_second:.0f} tokens/s/GPU; {setup.config.trainer.steps} "
        f"iterations: {plan.gpu_hours:.0f} GPU-hours, {plan.cost:.0f} USD"
    )
    table = Table(title="What each measure does here", title_justify="left")
    for name in ("measure", "now", "changed: time", "changed: peak memory"):
        table.add_column(name)
    for lever in levers(plan):
        table.add_row(lever.name, lever.state, f"{lever.seconds:+.1f} s", f"{lever.bytes / GIB:+.1f} GiB")
    console.print(table)
    for line in advise(plan):
        console.print(line)


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of a rank, GiB", title_justify="left")
    table.add_column("kind")
    for rank in plan.memory:
        table.add_column(f"stage {rank.stage}\nranks {rank.ranks}", justify="right")
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


def show_search(console: Console, found: list[Candidate], looked_at: int, seconds: float) -> None:
    """The best layouts and why."""
    if not found:
        console.print(f"none of {looked_at} layouts fits: take more GPUs, or shorter responses")
        return
    table = Table(title=f"The best of {looked_at} layouts ({seconds:.1f} s)", title_justify="left")
    for name in ("overrides", "s/iteration", "tokens/s/GPU", "peak GiB", "why"):
        table.add_column(name, overflow="fold")
    for candidate in found:
        plan = candidate.plan
        row = f"{plan.seconds:.1f}", f"{plan.tokens_per_gpu_second:.0f}", f"{plan.peak / GIB:.0f}"
        table.add_row(" ".join(candidate.overrides), *row, candidate.reason)
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
