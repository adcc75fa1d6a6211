"""`python tools/bench.py generate`: the embedded engine, `transformers` and vLLM on the same prompts and lengths, and the bare
matrix products, one after the other."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.help import Defaults
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.resilience.files import write_file

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("products", "this engine", "transformers", "vLLM")
RANDOM = "random-0.5B"
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}
"""Of Qwen2-0.5B."""


@dataclass(frozen=True)
class Generation:
    """What every engine generates.

    Attributes:
        model: HF folder.
        sequences: numbers of sequences that are generated at once, in turn, each from a different prompt.
        eager: vLLM runs without torch.compile, as this trainer runs it on a CPU.
    """

    model: str
    vocab: int
    dtype: str
    sequences: list[int]
    prompt_tokens: int
    tokens: int
    repeats: int
    threads: int
    eager: bool


@dataclass(frozen=True)
class Measured:
    """One engine with one number of sequences: the seconds of each whole generation and of each that stops after the first
    token, and the same in CPU time, which on a busy machine is the better measure with `--threads 1` (with more threads it
    includes waiting)."""

    engine: str
    sequences: int
    all: list[float]
    first: list[float]
    all_cpu: list[float]
    first_cpu: list[float]

    def step(self, tokens: int) -> float:
        """Seconds of a decoding step, from the tokens after the first."""
        return (median(self.all) - median(self.first)) / max(1, tokens - 1)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "generate",
        help="the embedded engine compared with transformers and vLLM",
        description="Responses of a fixed length to random prompts, sampled at temperature 1 by the embedded engine, by "
        "transformers and by vLLM (if installed), and the model's bare matrix products, each in a separate process, one after "
        f"the other, on CPU. {RANDOM} stands for a random model of the shape of Qwen2-0.5B.",
        formatter_class=Defaults,
    )
    parser.add_argument("--models", nargs="+", default=[RANDOM], help="HF folders")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 64], help="sequences at once")
    parser.add_argument("--prompt-tokens", type=int, default=43, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3, help="measured generations; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES, help="the engines to measure")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file")


def run(options: argparse.Namespace) -> None:
    """Measure every model, type and engine in turn.

    Raises:
        ConfigError: an option is wrong.
        KdrlError: an engine failed.
    """
    for name in ("prompt_tokens", "tokens", "repeats", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be at least 1")
    if min(options.sequences) < 1:
        raise ConfigError(f"--sequences has {min(options.sequences)}: it must be at least 1")
    engines = [engine for engine in options.engines if engine != "vLLM" or find_spec("vllm") is not None]
    console, report = Console(width=None if sys.stdout.isatty() else 120), []
    if engines != options.engines:
        console.print("vLLM is left out, as it is not installed")
    with console.status("") as status, tempfile.TemporaryDirectory(prefix="kdrl_bench_") as name:
        folder = Path(name)
        for model in options.models:
            path = make_random(folder / "random") if model == RANDOM else Path(model).resolve()
            if not (path / "config.json").is_file():
                raise ConfigError(f"--models: {path} is not an HF folder")
            vocab = json.loads((path / "config.json").read_text())["vocab_size"]
            for dtype in options.dtypes:
                work = Generation(
                    *(str(path), vocab, dtype, options.sequences, options.prompt_tokens, options.tokens, options.repeats),
                    *(options.threads, not options.compile),
                )
                write_file(folder / "work.json", json.dumps(asdict(work)))
                measured: list[Measured] = []
                for engine in engines:
                    status.update(f"{model}, {dtype}: {engine}")
                    measured += measure(engine, folder, work)
                console.print(table(f"{Path(model).name}, {dtype}", work, measured))
                report.append({"work": asdict(work), "measured": [asdict(one) for one in measured]})
                if options.json is not None:
                    write_file(options.json, json.dumps(report, indent=1) + "\n")


def make_random(folder: Path) -> Path:
    """Write a random model of the shape of Qwen2-0.5B in bfloat16, unless it exists."""
    if not folder.exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)).bfloat16().save_pretrained(folder)
    return folder


def measure(engine: str, folder: Path, work: Generation) -> list[Measured]:
    """Measure one engine in a separate process.

    Raises:
        KdrlError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.generate_engines", engine, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise KdrlError(f"{engine} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    times = json.loads(done.stdout.strip().splitlines()[-1])
    return [Measured(engine, int(count), **found) for count, found in times.items()]


def table(title: str, work: Generation, measured: list[Measured]) -> Table:
    """Medians, and ratios to the bare products."""
    title += f": {work.tokens} tokens after {work.prompt_tokens}, {work.threads} thread{'s' if work.threads > 1 else ''}"
    result = Table(title=title, title_justify="left")
    for name in (
        "sequences",
        "",
        "tokens/s",
        "whole",
        "/ products",
        "first token",
        "a step",
        "/ products",
        "CPU",
        "/ products",
    ):
        result.add_column(name, justify="right" if name else "left")
    bare = {one.sequences: one for one in measured if one.engine == "products"}
    for one in sorted(measured, key=lambda one: one.sequences):
        floor = bare.get(one.sequences)
        result.add_row(
            str(one.sequences),
            one.engine,
            f"{one.sequences * work.tokens / median(one.all):.0f}",
            f"{median(one.all):.2f} s",
            "-" if floor is None else f"{median(one.all) / median(floor.all):.2f}",
            f"{median(one.first):.2f} s",
            f"{1000 * one.step(work.tokens):.1f} ms",
            "-" if floor is None else f"{one.step(work.tokens) / floor.step(work.tokens):.2f}",
            f"{median(one.all_cpu):.2f} s",
            "-" if floor is None else f"{median(one.all_cpu) / median(floor.all_cpu):.2f}",
        )
    return result
