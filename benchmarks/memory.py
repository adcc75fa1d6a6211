"""`python tools/bench.py memory`: the memory of a rank while a real student is updated, compared with the plan."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.help import Defaults
from benchmarks.resident import peak_resident_bytes, resident_bytes, restart_peak
from kdrl_mcore.config import Config, load_config
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.planning.memory import GIB, RankMemory, plan_memory
from kdrl_mcore.planning.setup import make_setup
from kdrl_mcore.planning.workload import Workload

RANKS = 2
PROMPT = 16
"""The number of prompt tokens in every sequence."""
TIMEOUT = 900.0
LAYOUTS: dict[str, list[str]] = {
    "data": [],
    "data, not distributed": ["parallel.distributed_optimizer=false"],
    "tensor, sequence, bfloat16": ["parallel.tensor=2", "parallel.sequence_parallel=true", "model.dtype=bfloat16"],
    "pipeline, recompute, bfloat16": ["parallel.pipeline=2", "parallel.recompute=full", "model.dtype=bfloat16"],
    "pipeline, bfloat16": ["parallel.pipeline=2", "model.dtype=bfloat16"],
    "pipeline, mlp recomputed, bfloat16": ["parallel.pipeline=2", "parallel.recompute=selective", "model.dtype=bfloat16"],
    "tensor, sequence, norms and attention recomputed, bfloat16": [
        "parallel.tensor=2",
        "parallel.sequence_parallel=true",
        "parallel.recompute=selective",
        "parallel.recompute_modules=[layernorm,core_attn]",
        "model.dtype=bfloat16",
    ],
    "adapters, tensor, sequence, recompute, bfloat16": [
        "student.lora.rank=8",
        "parallel.tensor=2",
        "parallel.sequence_parallel=true",
        "parallel.recompute=full",
        "model.dtype=bfloat16",
    ],
    "adapters, data": ["student.lora.rank=8"],
    "interleaved pipeline": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context": ["parallel.context=2"],
    "experts": ["parallel.expert=2"],
}
"""The layouts of two ranks, by their overrides."""
ON_GPU_ONLY = ("communication", "CUDA")
"""Kinds of planned memory outside torch's allocator."""


@dataclass(frozen=True)
class Bytes:
    """The memory of one rank.

    Attributes:
        between: the bytes between updates.
        peak: the peak during an update.
    """

    between: int
    peak: int


@dataclass(frozen=True)
class Measured:
    """The measurements of one rank.

    Attributes:
        stage: its pipeline stage.
        held: the growth since before the student was built: on CPU that of the resident set, on CUDA that of the memory
            reserved by torch's allocator.
        loaded: the same at the peak of building and loading the student.
        live: the bytes of live tensors made since then; None if they were not counted.
    """

    stage: int
    held: Bytes
    loaded: int
    live: Bytes | None


@dataclass(frozen=True)
class Row:
    """One pipeline stage of a layout: the plan, and the measurements of its rank with the highest peak."""

    layout: str
    stage: int
    planned: Bytes
    measured: Measured


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "memory",
        help="the memory of a rank, compared with the plan",
        description="Two ranks, new processes for each layout, build a random student and update it twice. Shows the growth of "
        "the resident set (CUDA: of the reserved memory) between updates and at the peak of the second one, and the bytes of "
        "live tensors, next to the plan of kdrl-plan for the same run.",
        formatter_class=Defaults,
    )
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), help="layouts to measure in turn")
    parser.add_argument("--model", type=Path, metavar="DIR", help="HF folder of a real student, instead of a random one")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8, help="number of layers, a multiple of 4")
    parser.add_argument("--vocab", type=int, default=16384, help="size of the vocabulary")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per micro-batch on each context-parallel rank")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches per update on each data-parallel rank")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file")


def run(options: argparse.Namespace) -> None:
    """Measure every layout in turn.

    Raises:
        ConfigError: an option is wrong.
        KdrlError: a rank failed.
    """
    if options.hidden % 128 or options.layers % 4 or min(options.hidden, options.layers, options.micro_batches) < 1:
        raise ConfigError("--hidden must be a multiple of 128, --layers of 4, and --micro-batches at least 1")
    if options.tokens <= PROMPT:
        raise ConfigError(f"--tokens={options.tokens} must be more than the prompt's {PROMPT}")
    if options.model is not None and any(_mixture(name) for name in options.layouts):
        raise ConfigError("--model needs --layouts without experts")
    console, rows = Console(width=None if sys.stdout.isatty() else 130), []
    with console.status("") as status, tempfile.TemporaryDirectory(prefix="kdrl_bench_") as folder:
        for mixture in {_mixture(name) for name in options.layouts}:
            model = Path(folder) / f"model{mixture:d}"
            if options.model is not None:
                model.symlink_to(options.model.resolve(), target_is_directory=True)
            else:
                write_model(model, options.hidden, options.layers, options.vocab, mixture=mixture)
            write_model(Path(folder) / f"small{mixture:d}", 128, 4, 256, mixture=mixture)
        for layout in options.layouts:
            status.update(layout)
            rows += measure(Path(folder), layout, options.tokens, options.micro_batches)
    console.print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def write_model(folder: Path, hidden: int, layers: int, vocab: int, *, mixture: bool = False) -> Path:
    """Write a random Qwen2 with an untied head, or a Qwen3 mixture of eight experts with two per token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    }
    if mixture:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * hidden // 8, "head_dim": 64}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).save_pretrained(folder)
    else:
        Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder)
    return folder


def configure(layout: str, model: Path, tokens: int) -> tuple[list[str], Config]:
    """The overrides of a run, and the configuration that they give."""
    overrides = ["objective=sft", f"student.path={model}", f"batch.micro_tokens={tokens}", *LAYOUTS[layout]]
    return overrides, load_config(overrides)


def plan(config: Config, tokens: int, micro_batches: int, ranks: int = RANKS) -> list[RankMemory]:
    """The planner's memory for the updates of `measure_on_rank`, by pipeline stage."""
    parallel = config.parallel
    data = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    length = tokens * parallel.context - PROMPT
    if torch.cuda.is_available():
        config.cluster.memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    workload = Workload(micro_batches * data, PROMPT, length, length)
    return [without(rank, ON_GPU_ONLY) for rank in plan_memory(make_setup(config, workload, world_size=ranks))]


def without(rank: RankMemory, kinds: Sequence[str]) -> RankMemory:
    """The same memory without some kinds."""
    return replace(rank, items=tuple(item for item in rank.items if item.kind not in kinds))


def measure(folder: Path, layout: str, tokens: int, micro_batches: int) -> list[Row]:
    """Measure the stages of one layout in new processes, which have ended when this returns.

    Raises:
        KdrlError: a rank failed or died.
    """
    mixture = _mixture(layout)
    overrides, config = configure(layout, folder / f"model{mixture:d}", tokens)
    planned = plan(config, tokens, micro_batches)
    small, _ = configure(layout, folder / f"small{mixture:d}", tokens)
    context = multiprocessing.get_context("spawn")
    processes, ranks = [], {}
    try:
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            settings = (rank, folder / f"store {layout}", small, overrides, tokens, micro_batches, theirs)
            processes.append(context.Process(target=_serve, args=settings, daemon=True))
            processes[-1].start()
            theirs.close()
            ranks[ours] = f"{layout}, rank {rank}"
        measured = collect(ranks)
    finally:
        for process in processes:
            process.kill()
            process.join()
    rows = []
    for stage, expected in enumerate(planned):
        fullest = max((one for one in measured if one.stage == stage), key=lambda one: one.held.peak)
        rows.append(Row(layout, stage, Bytes(round(expected.between_steps), round(expected.peak)), fullest))
    return rows


def _mixture(layout: str) -> bool:
    return "parallel.expert=2" in LAYOUTS[layout]


def collect(ranks: dict[Connection, str]) -> list[Measured]:
    """The ranks' answers, in the order in which they arrive, so that a failed rank is noticed while others still work.

    Args:
        ranks: the connection to each rank, and its name.

    Raises:
        KdrlError: a rank failed, died or did not answer.
    """
    answers: list[Measured] = []
    silent = dict(ranks)
    while silent:
        ready = wait(list(silent), TIMEOUT)
        if not ready:
            raise KdrlError(f"{', '.join(silent.values())}: no answer in {TIMEOUT:g} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            who = silent.pop(connection)
            try:
                answer = connection.recv()
            except (EOFError, ConnectionError):
                answer = "its process died (out of memory?)"
            if isinstance(answer, str):
                raise KdrlError(f"{who}: {answer}")
            answers.append(answer)
    return answers


def _serve(
    rank: int,
    store: Path,
    small: Sequence[str],
    overrides: Sequence[str],
    tokens: int,
    micro_batches: int,
    connection: Connection,
) -> None:
    """The main function of one rank. A small student comes first, so that code, thread pools and connections do not count as
    memory of the real one."""
    from kdrl_mcore.parallel.platform import destroy_groups, prepare_platform

    try:
        torch.set_num_threads(1)
        os.environ["LOCAL_RANK"] = str(rank)  # selects the GPU
        prepare_platform()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, f"file://{store}", timedelta(seconds=TIMEOUT), world_size=RANKS, rank=rank)
        kept = set(dist.distributed_c10d._world.pg_map)
        follow = not any(override.startswith("parallel.context") for override in overrides)
        measure_on_rank(small, PROMPT * 2, micro_batches, follow=follow)
        destroy_groups(kept)
        connection.send(measure_on_rank(overrides, tokens, micro_batches, follow=follow))
        dist.barrier()
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])


def measure_on_rank(overrides: Sequence[str], tokens: int, micro_batches: int, *, follow: bool = True) -> Measured:
    """Build the student and update it twice, on micro-batches of `tokens` tokens on each context-parallel rank. Collective over
    the world.

    Args:
        follow: whether to count the bytes of live tensors too.
    """
    from kdrl_mcore.parallel.packing import pack
    from kdrl_mcore.parallel.platform import prepare_platform
    from kdrl_mcore.planning.live import LiveBytes

    prepare_platform()
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.student.student import MicroBatch, Student
    from kdrl_mcore.vocab_parallel import HeadTokens

    def token_loss(of_chunk: HeadTokens, has_divergences: bool, rows: slice) -> tuple[Tensor, Any]:
        return -of_chunk.log_probs / tokens, ({}, {})

    config = load_config(overrides)
    assert config.student.path is not None
    gc.collect()
    before = _held()
    _restart_peak()
    with LiveBytes() if follow else nullcontext() as live:
        student = Student(config, dist.get_world_size(), read_architecture(config.student.path).vocab_size)
        loaded = _peak()
        layout, groups = student.groups.layout, student.groups
        sequence = np.arange(tokens * layout.context) % 200
        batches = [
            MicroBatch(
                pack(
                    [(0, sequence[:PROMPT], sequence[PROMPT:])],
                    layout.token_alignment,
                    context_rank=groups.context.rank(),
                    context_size=layout.context,
                ).on_device(),
                token_loss,
            )
            for _ in range(micro_batches)
        ]
        student.update(batches, lr=1e-4)  # creates the optimizer's state
        gc.collect()
        _restart_peak()
        if live is not None:
            live.restart_peak()
        student.update(batches, lr=1e-4)
        gc.collect()
        held = Bytes(_held() - before, _peak() - before)
        given = sum(
            tensor.untyped_storage().nbytes()
            for batch in batches
            for tensor in (batch.packed.tokens_S, batch.packed.positions_S, batch.packed.rows_T, batch.packed.targets_T)
        )
        followed = None if live is None else Bytes(live.now - given, live.peak - given)
    return Measured(groups.pipeline.rank(), held, loaded - before, followed)


def _held() -> int:
    if not torch.cuda.is_available():
        return resident_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _peak() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak_resident_bytes()


def _restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that the allocator caches must not count in the next peak
        torch.cuda.reset_peak_memory_stats()
    else:
        restart_peak()


def table(rows: Sequence[Row]) -> Table:
    """The memory in MiB, and the relative error of the plan."""
    held = "reserved" if torch.cuda.is_available() else "resident"
    result = Table(title=f"MiB of a rank: planned, {held}, live tensors", title_justify="left")
    result.add_column("layout, stage", no_wrap=True)
    for column in ("between: planned", held, "plan", "live", "peak: planned", held, "plan", "live", "loading"):
        result.add_column(column, justify="right")
    for row in rows:
        cells = []
        for when in ("between", "peak"):
            planned, holds = getattr(row.planned, when), getattr(row.measured.held, when)
            live = None if row.measured.live is None else getattr(row.measured.live, when)
            off = f"{planned / holds - 1:+.1%}" if holds else "-"
            cells += [_mib(planned), _mib(holds), off, "-" if live is None else _mib(live)]
        result.add_row(f"{row.layout}, {row.stage}", *cells, _mib(row.measured.loaded))
    return result


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"
