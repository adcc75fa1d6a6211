"""`python tools/bench.py convert`: import, export and verify, compared with a plain `cp` of the same bytes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.help import Defaults
from kdrl_mcore.convert.byte_ranges import num_elements, write_at
from kdrl_mcore.convert.hf_files import lay_out, shard_name, split_into_shards, write_index
from kdrl_mcore.convert.weight_map import global_tensors
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.model.families import FAMILIES, read_architecture

ROOT = Path(__file__).resolve().parents[1]
CONVERT = (sys.executable, "-m", "kdrl_mcore.cli", "convert")
NOISE_BYTES = 2**26  # random bytes that are written repeatedly


@dataclass(frozen=True)
class Timing:
    """The measurements of one command.

    Attributes:
        seconds: the time until it ended.
        synced_seconds: the time until its bytes were on disk too.
        peak_bytes: the largest resident memory of the process.
    """

    command: str
    seconds: float
    synced_seconds: float
    peak_bytes: int


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "convert",
        help="import, export and verification of a checkpoint",
        description="Generates a bfloat16 checkpoint in several files and measures cp, import, cp, export and verify on it, "
        "each in a separate process: time, time relative to cp, and peak memory.",
        formatter_class=Defaults,
    )
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the generated checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work; needs four times the size (default: a temporary folder)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the generated model")
    parser.add_argument("--vocab", type=int, default=151936, help="vocabulary of the generated model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the timings to this file")


def run(options: argparse.Namespace) -> None:
    """Generate a checkpoint, measure the commands, print the timings, and clean up.

    Raises:
        KdrlError: a command failed, or the exported checkpoint differs from the original.
    """
    with tempfile.TemporaryDirectory(prefix="kdrl_bench_", dir=options.folder) as name:
        folder = Path(name)
        num_bytes = generate(folder / "hf", int(options.gigabytes * 1e9), options.hidden, options.vocab)
        hf, megatron, back, copy = (str(folder / each) for each in ("hf", "megatron", "back", "copy"))
        timings = [measure("cp", ["cp", "-r", hf, copy])]
        shutil.rmtree(copy)
        timings.append(measure("import", [*CONVERT, "import", "--hf", hf, "--output", megatron]))
        timings.append(measure("cp", ["cp", "-r", megatron, copy]))
        shutil.rmtree(copy)
        timings.append(
            measure(
                "export",
                [*CONVERT, "export", "--checkpoint", megatron, "--output", back],
            )
        )
        shutil.rmtree(megatron)
        timings.append(measure("import", [*CONVERT, "import", "--hf", back, "--output", megatron]))
        timings.append(measure("verify", [*CONVERT, "verify", "--hf", hf, "--checkpoint", megatron]))
    Console(width=None if sys.stdout.isatty() else 100).print(table(timings, num_bytes))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"bytes": num_bytes, "timings": [asdict(each) for each in timings]}, indent=1) + "\n"
        )


def generate(path: Path, target_bytes: int, hidden: int, vocab: int) -> int:
    """Write a Qwen2 checkpoint of about this size with random weights, in files of 2 GB; returns its bytes."""
    path.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    layer = 2 * hidden * hidden * 45 // 4
    layers = max(1, (target_bytes - 4 * vocab * hidden) // layer)
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    architecture = read_architecture(path)
    tensors = {
        name: (shape, torch.bfloat16)
        for tensor in global_tensors(FAMILIES["Qwen2ForCausalLM"].rules(architecture), architecture)
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)
    }
    noise = torch.randint(0, 256, (NOISE_BYTES,), dtype=torch.uint8)
    shards = split_into_shards(tensors, 2 * 10**9)
    for number, shard in enumerate(shards, 1):
        ranges = lay_out(path / shard_name(number, len(shards)), {name: tensors[name] for name in shard})
        for index, each in enumerate(ranges.values()):
            left, at = num_elements(each.shape) * 2, each.offset
            with each.path.open("r+b", buffering=0) as file:
                shift = 8191 * index % (NOISE_BYTES // 2)  # so that no two tensors are equal
                while left:
                    chunk = noise[shift : shift + min(left, NOISE_BYTES - shift)]
                    write_at(file, chunk, at)
                    at, left, shift = at + len(chunk), left - len(chunk), 0
    total = sum(num_elements(shape) * 2 for shape, _ in tensors.values())
    write_index(path, shards, total)
    return total


def measure(name: str, command: list[str]) -> Timing:
    """Run a command and measure it.

    Raises:
        KdrlError: the command failed.
    """
    os.sync()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begin
    os.sync()
    if process.returncode:
        raise KdrlError(f"{name} failed: {output.decode().strip().splitlines()[-1]}")
    return Timing(name, seconds, time.monotonic() - begin, usage.ru_maxrss * 1024)


def table(timings: list[Timing], num_bytes: int) -> Table:
    """The timings and their ratios to the mean of the copies."""
    copies = [each for each in timings if each.command == "cp"]
    seconds = sum(each.seconds for each in copies) / len(copies)
    synced = sum(each.synced_seconds for each in copies) / len(copies)
    result = Table(title=f"{num_bytes / 1e9:.1f} GB", title_justify="left")
    result.add_column("command", no_wrap=True)
    for column in ("time", "/ cp", "until on disk", "/ cp", "peak memory"):
        result.add_column(column, justify="right")
    for each in timings:
        result.add_row(
            each.command,
            f"{each.seconds:.1f} s",
            f"{each.seconds / seconds:.2f}",
            f"{each.synced_seconds:.1f} s",
            f"{each.synced_seconds / synced:.2f}",
            f"{each.peak_bytes / 1e9:.2f} GB",
        )
    return result
