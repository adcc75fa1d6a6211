"""`python tools/bench.py refit`: the bytes per second of a refit, compared with a plain copy of the same bytes in memory."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.help import Defaults
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.rollout.vllm.receiver import WeightReceiver

TIMEOUT = 300.0
TRANSPORTS = {"memory": True, "broadcast": False}
"""The transports, and whether the engines are colocated for each."""


@dataclass(frozen=True)
class Timing:
    """The measurements of one layout and transport.

    Attributes:
        seconds, copy_seconds: the medians of the refits, and of the copies between them.
        num_bytes: the size of the model.
    """

    tp: int
    transport: str
    seconds: float
    copy_seconds: float
    num_bytes: int

    @property
    def share(self) -> float:
        """Bytes per second of the refit over those of the copy."""
        return self.copy_seconds / self.seconds


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "refit",
        help="weights from Megatron's shards to an engine",
        description="Sends a random Qwen2 with bfloat16 weights from `tp` ranks to one receiving process, by shared memory and "
        "by broadcast: gathering, renaming, checksums on both sides, the receiver's copy. Between the refits, one thread "
        "copies the same number of bytes once from memory to memory.",
        formatter_class=Defaults,
    )
    parser.add_argument("--megabytes", type=int, default=400, help="size of the model")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the model")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="ranks that share each layer, one process each")
    parser.add_argument("--bucket-mib", type=int, default=256, help="rollout.vllm.refit_bucket_mib")
    parser.add_argument("--repeats", type=int, default=5, help="timed refits and copies, taken in turn; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the timings to this file")


def run(options: argparse.Namespace) -> None:
    """Measure every layout and transport in turn.

    Raises:
        KdrlError: a refit failed.
    """
    with tempfile.TemporaryDirectory(prefix="kdrl_bench_") as folder:
        write_config(Path(folder), options.megabytes * 10**6, options.hidden)
        timings = [
            timing for tp in options.tp for timing in measure(Path(folder), tp, options.bucket_mib * 2**20, options.repeats)
        ]
    Console(width=None if sys.stdout.isatty() else 100).print(table(timings, options.bucket_mib))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(timing) for timing in timings], indent=1) + "\n")


def write_config(folder: Path, num_bytes: int, hidden: int, vocab: int = 32768) -> None:
    """Write the HF config of a Qwen2 of about this size."""
    layer = 2 * hidden * hidden * 45 // 4
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": vocab,
        "num_hidden_layers": max(1, (num_bytes - 4 * vocab * hidden) // layer),
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder: Path, tp: int, bucket_bytes: int, repeats: int) -> list[Timing]:
    """Measure both transports in one layout.

    Raises:
        KdrlError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    to_receiver, of_receiver = context.Pipe()
    processes = [context.Process(target=_receive, args=(of_receiver,), daemon=True)]
    for rank in range(tp):
        ends = (to_receiver, theirs) if rank == 0 else (None, None)
        arguments = (folder, rank, tp, bucket_bytes, repeats, *ends)
        processes.append(context.Process(target=_send, args=arguments, daemon=True))
    try:
        for process in processes:
            process.start()
        theirs.close()
        found = ours.recv() if ours.poll(TIMEOUT) else f"no answer in {TIMEOUT:g} s"
    except EOFError:
        found = "a rank died"
    finally:
        for process in processes:
            process.kill()
            process.join()
    if isinstance(found, str):
        raise KdrlError(f"refit with tp {tp}: {found}")
    return found


class _Discarding(WeightReceiver):
    """A worker without a model, which discards the weights."""

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for _ in weights:
            pass


class _Client:
    """A rank's view of the receiver."""

    index = 0
    address: str | None = "127.0.0.1:0"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        self._connection.send(dict(spec))
        return [self._connection.recv()]


def _receive(connection: Connection) -> None:
    """The main function of the receiving process."""
    torch.set_num_threads(1)
    while True:
        connection.send(_Discarding(0, 1, torch.device("cpu")).receive_weights(connection.recv()))


def _send(
    folder: Path, rank: int, tp: int, bucket_bytes: int, repeats: int, receiver: Connection | None, answer: Connection | None
) -> None:
    """The main function of one rank."""
    import torch.distributed as dist

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.config import ModelConfig
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.parallel.layout import Layout, create_student_groups
    from kdrl_mcore.rollout.refit.refit import send_weights

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{folder / f'store{tp}'}", world_size=tp, rank=rank)
        architecture = read_architecture(str(folder))
        groups = create_student_groups(Layout(tp, tensor=tp))
        model = ModelConfig(dtype="bfloat16")
        parts = build_model(architecture, model, groups, vocab_size=architecture.vocab_size, trainable=False)
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter.uniform_()
        servers = [] if receiver is None else [_Client(receiver)]
        timings = []
        for transport, colocated in TRANSPORTS.items():
            refits, copies, num_bytes = [], [], 0
            for _ in range(1 + repeats):
                dist.barrier()
                result = send_weights(parts, servers, 1, TIMEOUT, bucket_bytes, colocated=colocated)
                num_bytes = result.num_bytes
                refits.append(result.seconds)
                copies.append(_copy_seconds(num_bytes) if rank == 0 else 0.0)
            timings.append(Timing(tp, transport, median(refits[1:]), median(copies[1:]), num_bytes))
        if answer is not None:
            answer.send(timings)
            answer.recv()  # until this process is ended
        time.sleep(TIMEOUT)
    except Exception as error:
        if answer is None:
            raise
        answer.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _copy_seconds(num_bytes: int) -> float:
    source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    begin = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - begin


def table(timings: list[Timing], bucket_mib: int) -> Table:
    """The timings of the refits and the copies."""
    result = Table(title=f"{timings[0].num_bytes / 1e6:.0f} MB in buckets of {bucket_mib} MiB", title_justify="left")
    result.add_column("transport", no_wrap=True)
    for column in ("tp", "refit", "GB/s", "copy", "GB/s", "refit / copy (bytes a second)"):
        result.add_column(column, justify="right")
    for each in timings:
        result.add_row(
            each.transport,
            str(each.tp),
            f"{each.seconds * 1e3:.0f} ms",
            f"{each.num_bytes / each.seconds / 1e9:.2f}",
            f"{each.copy_seconds * 1e3:.0f} ms",
            f"{each.num_bytes / each.copy_seconds / 1e9:.2f}",
            f"{each.share:.2f}",
        )
    return result
