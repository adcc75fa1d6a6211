"""Convert checkpoints between Hugging Face's format and Megatron's, byte for byte, at any size.

    kdrl-convert import --hf DIR --output CKPT [--dtype bfloat16] [--overwrite]
    kdrl-convert export --checkpoint CKPT --output HF_DIR [--max-shard-size 5GB] [--overwrite] [--push ORG/NAME]
    kdrl-convert export --checkpoint CKPT --output PEFT_DIR --adapter [--base HF_DIR]
    kdrl-convert verify --hf DIR --checkpoint CKPT

CKPT is a converted checkpoint or a training checkpoint (RUN/checkpoints/step_NNNNNN), saved in any layout. That
of a run with adapters (student.lora) is exported with the adapters merged into their base, or with --adapter on their own.
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

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kdrl_mcore.convert.adapted import export_adapter_folder
from kdrl_mcore.convert.convert import Start, export_hf_folder, import_hf
from kdrl_mcore.convert.hf_files import unread_files
from kdrl_mcore.convert.hub import make_repository, push
from kdrl_mcore.convert.verify import STATUSES, Verification, verify
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.parallel.dtypes import DTYPES

SUFFIXES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
SHOWN = 20  # how many differing tensors are named one by one


def main(arguments: list[str]) -> int:
    """Run a sub-command; returns the exit code."""
    options = _parser().parse_args(arguments)
    for name in unread_files(options.hf) if "hf" in options else []:
        print(f"note: {options.hf} also holds {name}, which is not read", file=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    repository = getattr(options, "push", None)
    try:
        if repository is not None:  # before the export, so that errors come early
            make_repository(repository, private=options.private)
        with _progress(options.command) as start:
            if options.command == "import":
                dtype = DTYPES.get(options.dtype)
                import_hf(options.hf, options.output, dtype, start, options.threads, overwrite=options.overwrite)
            elif options.command == "export" and options.adapter:
                export_adapter_folder(options.checkpoint, options.output, options.base, overwrite=options.overwrite)
            elif options.command == "export":
                export_hf_folder(
                    options.checkpoint,
                    options.output,
                    start,
                    options.max_shard_size,
                    options.threads,
                    overwrite=options.overwrite,
                    base=options.base,
                )
            else:
                comparison = verify(options.hf, options.checkpoint, start, options.threads)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; the output is as it was before", file=sys.stderr)
        return 130
    if options.command == "verify":
        return _report(comparison)
    print(f"wrote {options.output}")
    if repository is not None:
        try:
            print(f"pushed to {push(options.output, repository)}")
        except KdrlError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="kdrl-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="write an HF checkpoint as a Megatron (torch_dist) one")
    into.add_argument("--hf", type=Path, required=True, help="an HF model directory with safetensors")
    into.add_argument("--output", type=Path, required=True, help="the checkpoint folder to write")
    into.add_argument("--dtype", choices=tuple(DTYPES), help="cast the weights (default: keep them)")
    export = commands.add_parser("export", help="write a converted or a training checkpoint as an HF checkpoint")
    export.add_argument("--checkpoint", type=Path, required=True, help="a converted or a training checkpoint")
    export.add_argument("--output", type=Path, required=True, help="the HF directory to write")
    export.add_argument("--max-shard-size", type=_size, default="5GB", help="largest file, such as 5GB (default: %(default)s)")
    export.add_argument("--adapter", action="store_true", help="write the adapters (student.lora) alone, as a PEFT folder")
    export.add_argument("--base", type=Path, help="the folder of the adapters' base, if it has moved since the run began")
    export.add_argument("--push", metavar="ORG/NAME", help="upload the HF directory to this model repository of the hub")
    export.add_argument(
        "--private", action="store_true", help="with --push: create the repository as private, if it does not exist"
    )
    check = commands.add_parser("verify", help="compare every tensor, byte for byte; exit 1 on any difference")
    check.add_argument("--hf", type=Path, required=True, help="an HF model directory with safetensors")
    check.add_argument("--checkpoint", type=Path, required=True, help="a converted or a training checkpoint")
    for command in (into, export):
        command.add_argument("--overwrite", action="store_true", help="replace an output that this tool wrote before")
    for command in (into, export, check):
        command.add_argument("--threads", type=int, help="number of threads (default: twice the cores, at most 8)")
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


def _report(comparison: Verification) -> int:
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
