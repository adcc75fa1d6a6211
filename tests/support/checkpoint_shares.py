"""Checkpoints of random states as the ranks of a pool save them, and what they hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

PATIENCE = 240.0
"""In seconds; a save starts processes, which takes long on a busy machine."""
QUIET = 0.2
"""Seconds before a save in which memory does not change."""
SMALL_BUCKETS = "parallel.overlap_grad_reduce=true parallel.bucket_size=3000"


class SaveTimes(NamedTuple):
    """When a save began and was complete (`time.monotonic`), and the process that collects the results of its writers."""

    began: float
    ended: float
    results: int


def save_on_rank(model: str, overrides: str, folder: str, load_from: str = "", earlier_form: bool = False) -> list[int]:
    """Build a student, whose optimizer gets random state or what is loaded, and save it.

    Returns:
        Bytes on this rank: what it wrote, what it held of the optimizer's state, and the new memory that describing the
        checkpoint needed for saving and for loading.
    """
    student = _make_student(model, overrides)
    import torch.distributed as dist

    from kdrl_mcore.checkpointing.checkpoint import load_checkpoint
    from kdrl_mcore.checkpointing.writer import CheckpointWriter
    from kdrl_mcore.parallel.host_state import state_tensors

    if load_from:
        load_checkpoint(Path(load_from), student)
    else:
        _make_random_state(student, dist.get_rank())
    state = list(state_tensors(student.optimizer.megatron))
    held = {tensor.untyped_storage().data_ptr() for tensor in [*state, *student.parts.parameters()]}
    with _earlier_form(student) if earlier_form else contextmanager(lambda: (yield))():
        new = [_bytes_beside(student.sharded_state(loading=loading), held) for loading in (False, True)]
        writer = CheckpointWriter(Path(folder), 0, asynchronous=True)
        writer.save(1, student, {})
        writer.finish()
    files = (Path(folder) / "step_000001" / "weights").glob(f"__{dist.get_rank()}_*")
    return [sum(file.stat().st_size for file in files), sum(tensor.nbytes for tensor in state), *new]


def save_at_known_times(model: str, folder: str) -> SaveTimes:
    """On a rank: save a student with random state."""
    student = _make_student(model, "model.dtype=float32")
    import torch.distributed as dist

    from kdrl_mcore.checkpointing.writer import CheckpointWriter
    from kdrl_mcore.parallel.mcore import _write_results_process

    _make_random_state(student, dist.get_rank())
    results = _write_results_process()._process.pid
    time.sleep(QUIET)
    began = time.monotonic()
    writer = CheckpointWriter(Path(folder), 0, asynchronous=True)
    writer.save(1, student, {})
    writer.finish()
    return SaveTimes(began, time.monotonic(), results)


class PeakMemory:
    """Samples the memory of processes and of all that they start, in a thread. A context manager.

    Memory that several processes share counts once: it is the sum of their proportional set sizes (Linux).
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._samples, self._ended = pids, list[tuple[float, dict[int, int]]](), threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def growth(self, began: float, ended: float, without: int) -> int:
        """By how many bytes the largest sample between two times exceeds the last one before, without one process."""
        totals = [(time, sum(size for pid, size in sizes.items() if pid != without)) for time, sizes in self._samples]
        before = [total for time, total in totals if time < began]
        during = [total for time, total in totals if began <= time <= ended]
        assert before and len(during) > 2, "no samples"
        return max(during) - before[-1]

    def _sample(self) -> None:
        while not self._ended.wait(QUIET / 10):
            now, sizes = time.monotonic(), dict[int, int]()
            for pid in self._pids:
                with suppress(psutil.Error):
                    parent = psutil.Process(pid)
                    for each in (parent, *parent.children(recursive=True)):
                        with suppress(psutil.Error):
                            sizes[each.pid] = each.memory_full_info().pss
            self._samples.append((now, sizes))


def give_up_a_save(model: str, folder: str) -> None:
    """On a rank: a checkpoint is written, but never completed, as in a run that fails meanwhile."""
    student = _make_student(model, "")
    import torch.distributed as dist

    from kdrl_mcore.checkpointing.writer import CheckpointWriter

    _make_random_state(student, dist.get_rank())
    writer = CheckpointWriter(Path(folder), 0, asynchronous=True)
    writer.save(1, student, {})
    writer._queue.async_calls[0].async_caller.process.join(PATIENCE)


def _make_student(model: str, overrides: str) -> Any:
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist

    from kdrl_mcore.config import load_config
    from kdrl_mcore.student.student import Student

    config = load_config([f"student.path={model}", "objective=grpo", "model.dtype=bfloat16", *overrides.split()])
    return Student(config, dist.get_world_size(), vocab_size=60)


def _make_random_state(student: Any, seed: int) -> None:
    from kdrl_mcore.parallel.host_state import state_tensors

    for chunk in student.optimizer.ddp:
        chunk.zero_grad_buffer()
    student.optimizer.megatron.prepare_grads()
    student.optimizer.megatron.step_with_ready_grads()  # creates the moments
    generator = torch.Generator().manual_seed(seed)
    for tensor in state_tensors(student.optimizer.megatron):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))


def _bytes_beside(state: Any, held: set[int]) -> int:
    """Bytes of the tensors in a sharded state that share no memory with `held`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    found = {}
    for sharded in nested_values(state):
        if torch.is_tensor(getattr(sharded, "data", None)):
            storage = sharded.data.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in found.items() if place not in held)


@contextmanager
def _earlier_form(student: Any) -> Iterator[None]:
    """Write checkpoints in the earlier form: Megatron-Core's re-shardable form with corrected ranges, written by one
    replica."""
    import kdrl_mcore.student.optimizer as module
    from kdrl_mcore.parallel import mcore

    @contextmanager
    def unpadded_ranges(optimizer: Any) -> Iterator[None]:
        buffers = [buffer for part in getattr(optimizer, "chained_optimizers", [optimizer]) for buffer in part.buffers]
        originals = [buffer.param_index_map for buffer in buffers]
        for buffer in buffers:
            sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
            shifts = [bucket.offset - sum(sizes[:index]) for index, bucket in enumerate(buffer.buckets)]
            buffer.param_index_map = {
                parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
        for buffer, original in zip(buffers, originals, strict=True):
            buffer.param_index_map = original

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "held_shares", unpadded_ranges)
        patch.setattr(mcore, "parallel_save_strategy", lambda replicas: None)
        yield


def differing_tensors(*folders: str) -> list[str] | None:
    """On a rank: the tensors whose names or bits differ between the checkpoints; None on the other ranks."""
    import torch.distributed as dist

    if dist.get_rank():
        return None
    contents = [tensors_of(folder) for folder in folders]
    first = contents[0]
    assert sum("exp_avg_sq" in name for name in first) > 5  # those of experts are named after their separate optimizer
    names = {name for tensors in contents for name in tensors}
    return [
        name
        for name in sorted(names)
        if not all(name in each and torch.equal(each[name], first.get(name)) for each in contents)
    ]


def differing_states(first: str, second: str) -> list[str] | None:
    """As `differing_tensors`, for two checkpoints, matching tensors by the state and the weight that their names stand for."""
    import torch.distributed as dist

    from kdrl_mcore.parallel.optimizer_state import _NAME, _state_and_weight

    if dist.get_rank():
        return None
    before, after = (
        {_state_and_weight(name) if _NAME.fullmatch(name) else name: tensor for name, tensor in tensors_of(folder).items()}
        for folder in (first, second)
    )
    assert sum("exp_avg_sq" in name for name in before) > 5
    return [str(name) for name in before.keys() | after.keys() if not torch.equal(before[name], after[name])]


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    """Every tensor of the first checkpoint in a folder, whole."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(f"{folder}/step_000001/weights")
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
