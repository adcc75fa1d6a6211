"""Checkpoints: each rank saves and loads the share of the optimizer's state that it holds, and nothing else; in any layout, and
in the form of earlier checkpoints, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_mcore.parallel.optimizer_state import blocks_of_range
from tests.ranks import RankPool
from tests.reference.tiny_models import make_model
from tests.zoo import Zoo

PATIENCE = 600.0
"""Seconds; a save starts processes, which takes long on a busy machine."""
pytestmark = pytest.mark.timeout(1800)

SMALL_BUCKETS = "parallel.overlap_grad_reduce=true parallel.bucket_size=3000"
LAYOUTS = {
    "dp4": "",
    "tp2 dp2 sp, small buckets": f"parallel.tensor=2 parallel.sequence_parallel=true {SMALL_BUCKETS}",
    "tp2 pp2": "parallel.tensor=2 parallel.pipeline=2",
    "pp2 interleaved, cp2": f"parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.context=2 {SMALL_BUCKETS}",
}


def save_on_rank(model: str, overrides: str, folder: str, load_from: str = "", earlier_form: bool = False) -> list[int]:
    """Build a student, whose optimizer gets random state or what is loaded, and save it.

    Returns:
        The bytes that this rank wrote, those it held of the optimizer's state, and those of new memory that the checkpoint
        needed on this rank while it was described for saving, and for loading.
    """
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist

    from kdrl_mcore.checkpointing.checkpoint import load_checkpoint
    from kdrl_mcore.checkpointing.writer import CheckpointWriter
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.host_state import state_tensors
    from kdrl_mcore.student import Student

    config = load_config([f"student.path={model}", "objective=grpo", "model.dtype=bfloat16", *overrides.split()])
    student = Student(config, dist.get_world_size(), vocabulary=60)
    if load_from:
        load_checkpoint(Path(load_from), student)
    else:
        _make_random_state(student, dist.get_rank())
    state = list(state_tensors(student.optimizer))
    held = {tensor.untyped_storage().data_ptr() for tensor in [*state, *student.parts.parameters()]}
    with _earlier_form(student) if earlier_form else contextmanager(lambda: (yield))():
        new = [_bytes_beside(student.sharded_state(loading=loading), held) for loading in (False, True)]
        writer = CheckpointWriter(Path(folder), 0, asynchronous=True)
        writer.save(1, student, {})
        writer.finish()
    files = (Path(folder) / "step_000001" / "weights").glob(f"__{dist.get_rank()}_*")
    return [sum(file.stat().st_size for file in files), sum(tensor.nbytes for tensor in state), *new]


def _make_random_state(student: Any, seed: int) -> None:
    from kdrl_mcore.parallel.host_state import state_tensors

    for chunk in student.ddp:
        chunk.zero_grad_buffer()
    student.optimizer.prepare_grads()
    student.optimizer.step_with_ready_grads()  # the moments come into being
    generator = torch.Generator().manual_seed(seed)
    for tensor in state_tensors(student.optimizer):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))


def _bytes_beside(state: Any, held: set[int]) -> int:
    """Of the tensors in a sharded state that lie in no memory of `held`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    found = {}
    for sharded in nested_values(state):
        if torch.is_tensor(getattr(sharded, "data", None)):
            storage = sharded.data.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in found.items() if place not in held)


@contextmanager
def _earlier_form(student: Any) -> Iterator[None]:
    """Checkpoints as they were written before: Megatron-Core's own re-shardable form, its ranges corrected, by one replica."""
    import kdrl_mcore.student as module
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
    """On a rank: the tensors in which checkpoints differ in one bit, or in their names; None on the others."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    if dist.get_rank():
        return None
    contents = []
    for folder in folders:
        reader = dcp.FileSystemReader(f"{folder}/step_000001/weights")
        described = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in described.items()
            if hasattr(entry, "size")
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        contents.append(tensors)
    first = contents[0]
    assert sum("exp_avg_sq" in name for name in first) > 5  # of experts under a name of their own optimizer
    names = {name for tensors in contents for name in tensors}
    return [
        name
        for name in sorted(names)
        if not all(name in each and torch.equal(each[name], first.get(name)) for each in contents)
    ]


@pytest.mark.parametrize("before", LAYOUTS)
def test_every_form_and_layout_holds_the_same_bits(before: str, zoo: Zoo, ranks4: RankPool, tmp_path: Path) -> None:
    """A state is saved in both forms; each is loaded in the next layout and saved there."""
    names = list(LAYOUTS)
    after = LAYOUTS[names[(names.index(before) + 1) % len(names)]]
    save = partial(ranks4.run, save_on_rank, str(zoo.model("tied")), timeout=PATIENCE)
    save(LAYOUTS[before], f"{tmp_path}/earlier", "", True)
    save(LAYOUTS[before], f"{tmp_path}/shares")
    save(after, f"{tmp_path}/moved", f"{tmp_path}/shares/step_000001")
    save(after, f"{tmp_path}/moved_earlier", f"{tmp_path}/earlier/step_000001")
    folders = [f"{tmp_path}/{name}" for name in ("earlier", "shares", "moved", "moved_earlier")]
    assert ranks4.run(differing_tensors, *folders, timeout=PATIENCE)[0] == []


def test_experts_too(ranks4: RankPool, tmp_path: Path) -> None:
    model = str(make_model("qwen3_moe", tmp_path / "hf", seed=4, vocab_size=66))  # which two ranks share
    ranks4.run(save_on_rank, model, "parallel.expert=2", f"{tmp_path}/earlier", "", True, timeout=PATIENCE)
    ranks4.run(save_on_rank, model, "parallel.expert=2", f"{tmp_path}/shares", timeout=PATIENCE)
    layout = "parallel.expert=4 parallel.tensor=2 parallel.sequence_parallel=true"
    ranks4.run(save_on_rank, model, layout, f"{tmp_path}/moved", f"{tmp_path}/shares/step_000001", timeout=PATIENCE)
    folders = [f"{tmp_path}/{name}" for name in ("earlier", "shares", "moved")]
    assert ranks4.run(differing_tensors, *folders, timeout=PATIENCE)[0] == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_rank_writes_its_share_and_nothing_is_gathered(layout: str, zoo: Zoo, ranks4: RankPool, tmp_path: Path) -> None:
    found = ranks4.run(save_on_rank, str(zoo.model("deep")), layout, f"{tmp_path}/run", timeout=PATIENCE)
    for written, state, new_saving, new_loading in found:
        assert new_saving == new_loading == 0  # what is staged is what the rank holds, and it is loaded into its place
        # Its share of the weights, 4 bytes to the state's 8, and names; a replica that gathered would write twice its state.
        assert state < written < 1.8 * state


def test_blocks_lie_one_after_the_other() -> None:
    for shape in [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4)]:
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        for start in range(numbers.numel() + 1):
            for end in range(start, numbers.numel() + 1):
                blocks = blocks_of_range(shape, start, end)
                cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*block, strict=True))].flatten() for block in blocks]
                assert torch.cat([*cut, numbers.new_empty(0)]).tolist() == list(range(start, end))
                assert len(blocks) <= 2 * len(shape) - 1
