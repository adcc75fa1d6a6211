"""Checkpoints: each rank saves and loads only the share of the optimizer's state that it holds; the bits are the same in any
layout and in the form of earlier checkpoints."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from kdrl_mcore.parallel.optimizer_state import blocks_of_range
from tests.reference.tiny_models import make_model, make_qwen2
from tests.support.checkpoint_shares import (
    PATIENCE,
    SMALL_BUCKETS,
    PeakMemory,
    differing_states,
    differing_tensors,
    give_up_a_save,
    save_at_known_times,
    save_on_rank,
)
from tests.support.ranks import RankPool
from tests.support.zoo import Zoo

pytestmark = pytest.mark.timeout(1800)

LAYOUTS = {
    "dp4": "",
    "tp2 dp2 sp, small buckets": f"parallel.tensor=2 parallel.sequence_parallel=true {SMALL_BUCKETS}",
    "tp2 pp2": "parallel.tensor=2 parallel.pipeline=2",
    "pp2 interleaved, cp2": f"parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.context=2 {SMALL_BUCKETS}",
}


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
    model = str(make_model("qwen3_moe", tmp_path / "hf", seed=4, vocab_size=66))  # a vocabulary that two ranks share
    ranks4.run(save_on_rank, model, "parallel.expert=2", f"{tmp_path}/earlier", "", True, timeout=PATIENCE)
    ranks4.run(save_on_rank, model, "parallel.expert=2", f"{tmp_path}/shares", timeout=PATIENCE)
    layout = "parallel.expert=4 parallel.tensor=2 parallel.sequence_parallel=true"
    ranks4.run(save_on_rank, model, layout, f"{tmp_path}/moved", f"{tmp_path}/shares/step_000001", timeout=PATIENCE)
    folders = [f"{tmp_path}/{name}" for name in ("earlier", "shares", "moved")]
    assert ranks4.run(differing_tensors, *folders, timeout=PATIENCE)[0] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("parallel.expert=2", ""),  # the experts then have a separate optimizer, or not
        ("", "parallel.expert=2 parallel.distributed_optimizer=false"),
        ("parallel.expert=2 parallel.distributed_optimizer=false", "parallel.tensor=2 parallel.sequence_parallel=true"),
    ],
    ids=["gathered", "spread, not distributed", "distributed, gathered"],
)
def test_experts_and_optimizers_under_other_names(before: str, after: str, ranks2: RankPool, tmp_path: Path) -> None:
    """The bits are the same whichever optimizer holds them and however it spells their names."""
    model = str(make_model("qwen3_moe", tmp_path / "hf", seed=4, vocab_size=66))
    ranks2.run(save_on_rank, model, before, f"{tmp_path}/before", timeout=PATIENCE)
    ranks2.run(save_on_rank, model, after, f"{tmp_path}/after", f"{tmp_path}/before/step_000001", timeout=PATIENCE)
    assert ranks2.run(differing_states, f"{tmp_path}/before", f"{tmp_path}/after", timeout=PATIENCE)[0] == []


def test_a_save_that_was_given_up_leaves_nothing_to_the_next(ranks2: RankPool, tmp_path: Path) -> None:
    model = str(make_model("qwen3_moe", tmp_path / "hf", seed=4, vocab_size=66))
    other = str(make_model("qwen3", tmp_path / "other", seed=4, vocab_size=66))
    ranks2.run(give_up_a_save, other, f"{tmp_path}/given_up", timeout=PATIENCE)
    ranks2.run(save_on_rank, model, "", f"{tmp_path}/before", timeout=PATIENCE)
    ranks2.run(save_on_rank, model, "", f"{tmp_path}/after", f"{tmp_path}/before/step_000001", timeout=PATIENCE)
    assert ranks2.run(differing_states, f"{tmp_path}/before", f"{tmp_path}/after", timeout=PATIENCE)[0] == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_rank_writes_its_share_and_nothing_is_gathered(layout: str, zoo: Zoo, ranks4: RankPool, tmp_path: Path) -> None:
    found = ranks4.run(save_on_rank, str(zoo.model("deep")), layout, f"{tmp_path}/run", timeout=PATIENCE)
    for written, state, new_saving, new_loading in found:
        assert new_saving == new_loading == 0  # nothing is copied to save, and the checkpoint is loaded in place
        # Its share of the weights, 4 bytes for 8 of state, and names; a replica that gathered would write twice its state.
        assert state < written < 1.8 * state


def test_a_save_copies_nothing_in_memory(ranks1: RankPool, tmp_path: Path) -> None:
    """The processes that write see the rank's memory. What they need themselves does not grow with the state."""
    model = make_qwen2(tmp_path / "hf", seed=4, hidden_size=1024, num_layers=1, num_heads=8, intermediate_size=8192)
    ranks1.run(os.getpid)  # the pool has started
    with PeakMemory(ranks1.pids) as memory:
        (times,) = ranks1.run(save_at_known_times, str(model), f"{tmp_path}/run", timeout=PATIENCE)
    weights = (tmp_path / "run" / "step_000001" / "weights").glob("*.distcp")
    state = sum(file.stat().st_size for file in weights)
    assert state > 300e6
    assert memory.growth(*times) < state / 2  # a copy of the tensors that share a buffer would be almost the whole state


def test_blocks_lie_one_after_the_other() -> None:
    for shape in [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4)]:
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        for start in range(numbers.numel() + 1):
            for end in range(start, numbers.numel() + 1):
                blocks = blocks_of_range(shape, start, end)
                cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*block, strict=True))].flatten() for block in blocks]
                assert torch.cat([*cut, numbers.new_empty(0)]).tolist() == list(range(start, end))
                assert len(blocks) <= 2 * len(shape) - 1
