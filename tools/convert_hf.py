"""Convert checkpoints between Hugging Face's format and Megatron's, byte for byte, at any size.

    python tools/convert_hf.py import --hf DIR --output CKPT [--dtype bfloat16]
    python tools/convert_hf.py export --checkpoint CKPT --output HF_DIR [--max-shard-size 5GB]
    python tools/convert_hf.py verify --hf DIR --checkpoint CKPT

CKPT is a converted checkpoint or a training checkpoint (RUN/checkpoints/step_NNNNNN), whatever layout saved it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kdrl_mcore.convert.convert import Start, export_hf_folder, import_hf
from kdrl_mcore.convert.verify import STATUSES, Comparison, verify
from kdrl_mcore.errors import KdrlError

SUFFIXES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 20  # tensors that are not equal, named one by one


def main(arguments: list[str]) -> int:
    """Run a sub-command; returns the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        with _progress(options.command) as start:
            if options.command == "import":
                import_hf(options.hf, options.output, DTYPES.get(options.dtype), start, options.threads)
            elif options.command == "export":
                export_hf_folder(options.checkpoint, options.output, start, options.max_shard_size, options.threads)
            else:
                comparison = verify(options.hf, options.checkpoint, start, options.threads)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    if options.command == "verify":
        return _report(comparison)
    print(f"wrote {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="write an HF checkpoint as a Megatron (torch_dist) one")
    into.add_argument("--hf", type=Path, required=True, help="an HF model directory with safetensors")
    into.add_argument("--output", type=Path, required=True, help="the checkpoint folder to write")
    into.add_argument("--dtype", choices=tuple(DTYPES), help="cast the weights (default: keep them)")
    export = commands.add_parser("export", help="write a converted or a training checkpoint as an HF checkpoint")
    export.add_argument("--checkpoint", type=Path, required=True, help="a converted or a training checkpoint")
    export.add_argument("--output", type=Path, required=True, help="the HF directory to write")
    export.add_argument("--max-shard-size", type=_size, default="5GB", help="largest file, such as 5GB (default: %(default)s)")
    check = commands.add_parser("verify", help="compare every tensor, byte for byte; exit 1 on any difference")
    check.add_argument("--hf", type=Path, required=True, help="an HF model directory with safetensors")
    check.add_argument("--checkpoint", type=Path, required=True, help="a converted or a training checkpoint")
    for command in (into, export, check):
        command.add_argument("--threads", type=int, help="that read and write (default: twice the cores, at most 8)")
    return parser


@contextmanager
def _progress(command: str) -> Iterator[Start]:
    """A bar with bytes, speed and time left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=not sys.stderr.isatty()) as bar:

        def start(total: int) -> Callable[[int], None]:
            task, lock = bar.add_task(command, total=total), threading.Lock()

            def advance(num_bytes: int) -> None:
                with lock:
                    bar.advance(task, num_bytes)

            return advance

        yield start


def _report(comparison: Comparison) -> int:
    table = Table("tensor", *STATUSES)
    for name, counts in comparison.table():
        table.add_row(name, *(str(counts[status] or "-") for status in STATUSES))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for name, why in list(comparison.why.items())[:SHOWN]:
        print(f"{comparison.status[name]}: {name}: {why}")
    if len(comparison.why) > SHOWN:
        print(f"... and {len(comparison.why) - SHOWN} more")
    total = Counter(comparison.status.values())
    print(", ".join(f"{total[status]} {status}" for status in STATUSES))
    print(f"sha256 of the HF tensors:         {comparison.digests[0]}")
    print(f"sha256 of the checkpoint's tensors: {comparison.digests[1]}")
    return 0 if comparison.agrees else 1


def _size(text: str) -> int:
    number, suffix = text[:-2], text[-2:].upper()
    if suffix not in SUFFIXES or not number.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 500MB or 5GB")
    return int(number) * SUFFIXES[suffix]


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
