"""Convert between HF's safetensors and Megatron's torch_dist, a block of rows at a time, with several threads."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import torch

from kdrl_mcore.convert.adapted import open_weights
from kdrl_mcore.convert.byte_ranges import NO_KERNEL_COPY, ByteRange, StoredTensor, num_elements, raw_bytes, write_at
from kdrl_mcore.convert.folders import RELEASE, TRACKER, torch_dist_folder
from kdrl_mcore.convert.hf_files import (
    KEPT,
    Described,
    HFWeights,
    copy_side_files,
    lay_out,
    shard_name,
    split_into_shards,
    write_config,
    write_index,
)
from kdrl_mcore.convert.targets import check_target, replacing_folder
from kdrl_mcore.convert.torch_dist_writer import TorchDistWriter
from kdrl_mcore.convert.weight_map import Weights, check_names, global_tensors
from kdrl_mcore.errors import CheckpointError, ModelError
from kdrl_mcore.model.families import FAMILIES, config_folder, read_architecture
from kdrl_mcore.model.families.base import Architecture, WeightRule

BLOCK_BYTES = 16 * 2**20
"""How much one thread reads, casts and writes at a time."""
Progress = Callable[[int], None]
"""Called for every block with the number of bytes just done."""
Start = Callable[[int], Progress]
"""Called once before the first block with the number of bytes to do."""


@dataclass(frozen=True)
class Copy:
    """Rows of an HF tensor and where their bytes go."""

    name: str
    start: int
    rows: int
    target: StoredTensor
    target_row: int


def import_hf(
    hf: str | Path,
    output: str | Path,
    dtype: torch.dtype | None,
    start: Start,
    threads: int | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Convert an HF checkpoint to Megatron's torch_dist format, together with config and tokenizer.

    Args:
        dtype: cast every tensor to this dtype; None casts nothing.
        overwrite: an earlier output may be replaced (`check_target`).

    Raises:
        ModelError: the source is damaged or not supported, or the output cannot be written. The output is then unchanged.
    """
    hf, output = Path(hf), Path(output)
    check_target(output, [hf], overwrite=overwrite)
    architecture = read_architecture(hf)
    rules = FAMILIES[architecture.family].rules(architecture)
    with HFWeights(hf) as weights:
        check_names(weights, architecture, rules)
        tensors = list(global_tensors(rules, architecture))
        found = {weights.dtype(name) for tensor in tensors if not tensor.keeps_dtype for name in tensor.hf_names}
        if len(found) > 1 and dtype is None:
            raise ModelError(f"{hf} mixes {' and '.join(sorted(map(str, found)))}: choose one with --dtype")
        to = dtype or found.pop()
        dtypes = [weights.dtype(tensor.hf_names[0]) if tensor.keeps_dtype else to for tensor in tensors]
        kept = _kept(weights, architecture)
        total = sum(num_elements(tensor.shape) * each.itemsize for tensor, each in zip(tensors, dtypes, strict=True))
        total += sum(num_elements(shape) * each.itemsize for shape, each in kept.values())
        with replacing_folder(output, total, [hf], overwrite=overwrite) as temporary:
            writer = TorchDistWriter(temporary / RELEASE)
            copies = _copies(lay_out(temporary / KEPT, kept)) if kept else []
            for tensor, stored_as in zip(tensors, dtypes, strict=True):
                # Megatron stores gate and up in separate chunks, and query, key and value interleaved in one.
                bounds = [0, tensor.hf_shapes[0][0], tensor.shape[0]] if len(tensor.hf_names) == 2 else [0, tensor.shape[0]]
                for low, high in pairwise(bounds):
                    target = writer.place(tensor, low, high - low, stored_as)
                    copies += [
                        Copy(tensor_slice.hf, tensor_slice.hf_start, tensor_slice.length, target, tensor_slice.start - low)
                        for tensor_slice in tensor.slices
                        if low <= tensor_slice.start < high
                    ]
            writer.place_extra_states(architecture)
            writer.end_layout()
            copy_all(weights, copies, start(total), threads)
            writer.finish(architecture, to)
            (temporary / TRACKER).write_text(RELEASE)
            write_config(hf, temporary, to)


def export_hf_folder(
    checkpoint: str | Path,
    output: str | Path,
    start: Start,
    max_shard_bytes: int = 5 * 10**9,
    threads: int | None = None,
    *,
    overwrite: bool = False,
    base: str | Path | None = None,
) -> None:
    """Write a converted or a training checkpoint as an HF checkpoint, without vocabulary padding. If it holds adapters alone,
    they are merged into their base.

    Args:
        max_shard_bytes: the size of the largest file (or one tensor).
        overwrite: an earlier output may be replaced (`check_target`).
        base: see `open_weights`.

    Raises:
        ModelError, CheckpointError: the source is damaged, or the output cannot be written. The output is then unchanged.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    sources = [checkpoint, *([] if base is None else [base])]
    check_target(output, sources, overwrite=overwrite)
    if torch_dist_folder(checkpoint) is None:
        raise CheckpointError(f"{checkpoint} is neither a converted nor a training checkpoint")
    config = config_folder(checkpoint)
    architecture = read_architecture(checkpoint)
    rules = FAMILIES[architecture.family].rules(architecture)
    with open_weights(checkpoint, base) as weights:
        check_names(weights, architecture, rules)
        names = sorted(weights.names)
        tensors = {name: (weights.shape(name), weights.dtype(name)) for name in names}
        shards = split_into_shards(tensors, max_shard_bytes)
        total = sum(num_elements(shape) * dtype.itemsize for shape, dtype in tensors.values())
        with replacing_folder(output, total, sources, overwrite=overwrite) as temporary:
            copies: list[Copy] = []
            for number, shard in enumerate(shards, 1):
                laid_out = lay_out(temporary / shard_name(number, len(shards)), {name: tensors[name] for name in shard})
                copies += _copies(laid_out)
            copy_all(weights, copies, start(total), threads)
            write_index(temporary, shards, total)
            own = {name for rule in rules if rule.keeps_dtype for name in _names_of(rule, architecture)}
            dtypes = {weights.dtype(name) for name in names if name not in own and not architecture.keeps(name)}
            if len(dtypes) == 1:
                write_config(config, temporary, dtypes.pop())
            else:
                copy_side_files(config, temporary)


def write_kept(model: str | Path, file: Path) -> Described:
    """Write the tensors of a model folder that belong to no layer of the model to a safetensors file, unchanged, and describe
    them. Where there are none, no file is written.

    Raises:
        ModelError, CheckpointError: the model folder is damaged.
    """
    architecture = read_architecture(model)
    if not architecture.kept_layers:
        return {}
    with open_weights(model) as weights:
        if kept := _kept(weights, architecture):
            copy_all(weights, _copies(lay_out(file, kept)), lambda _: None)
    return kept


def _kept(weights: Weights, architecture: Architecture) -> Described:
    return {name: (weights.shape(name), weights.dtype(name)) for name in sorted(weights.names) if architecture.keeps(name)}


def _copies(laid_out: dict[str, StoredTensor]) -> list[Copy]:
    """Copies of whole tensors."""
    return [Copy(name, 0, target.shape[0], target, 0) for name, target in laid_out.items()]


def _names_of(rule: WeightRule, architecture: Architecture) -> list[str]:
    return [name.format(layer=layer) for layer in range(architecture.num_layers) for name in rule.hf]


def blocks(start: int, rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of at most BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for low in range(start, start + rows, step):
        yield low, min(step, start + rows - low)


def copy_all(weights: Weights, copies: Iterable[Copy], progress: Progress, threads: int | None = None) -> None:
    """Fill in the bytes of every copy, cast to the target's dtype."""

    def copy(item: Copy) -> None:
        with item.target.path.open("r+b", buffering=0) as file:
            if weights.dtype(item.name) != item.target.dtype or not _copy_in_kernel(weights, item, file.fileno(), progress):
                for low, rows in blocks(item.start, item.rows, item.target.row_bytes):
                    data = raw_bytes(weights.read(item.name, low, rows).to(item.target.dtype))
                    at = item.target.offset + (item.target_row + low - item.start) * item.target.row_bytes
                    write_at(file, data, at)
                    progress(data.numel())

    run_all([lambda item=item: copy(item) for item in _by_turns(copies)], threads)  # type: ignore[misc]


def _by_turns(copies: Iterable[Copy]) -> list[Copy]:
    """Order copies by taking one into each file in turn, so that threads seldom write to the same file."""
    by_file: dict[Path, list[Copy]] = defaultdict(list)
    for item in copies:
        by_file[item.target.path].append(item)
    return [item for turn in zip_longest(*by_file.values()) for item in turn if item is not None]


def _copy_in_kernel(weights: Weights, item: Copy, target: int, progress: Progress) -> bool:
    """Copy rows without reading them into memory; returns False where that is not possible."""
    ranges = weights.ranges(item.name, item.start, item.rows)
    if ranges is None or not hasattr(os, "copy_file_range"):
        return False
    at, done = item.target.offset + item.target_row * item.target.row_bytes, 0
    for whole in ranges:
        for low in range(0, whole.length, BLOCK_BYTES):
            length = min(BLOCK_BYTES, whole.length - low)
            try:
                weights.files.copy(ByteRange(whole.path, whole.offset + low, length), target, at + done)
            except OSError as error:
                if done == 0 and error.errno in NO_KERNEL_COPY:
                    return False
                raise
            done += length
            progress(length)
    return True


def run_all(jobs: list[Callable[[], None]], threads: int | None) -> None:
    """Run jobs on threads. The first error cancels those that have not started."""
    with ThreadPoolExecutor(threads or min(8, 2 * (os.cpu_count() or 1))) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
