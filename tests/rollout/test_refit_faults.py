"""A refit that fails says so on every rank within its time-out and names the tensor, and a later refit succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdrl_mcore.errors import RefitError
from tests.reference.tiny_models import make_model
from tests.support import refit_ranks
from tests.support.ranks import RankDiedError, RankPool
from tests.support.receiver import Process, assert_holds
from tests.support.refit_ranks import VICTIM

TIMEOUT = 6.0
"""The time-out in seconds of refits in which somebody does not answer."""
PATIENCE = 50.0
"""The time-out of the other refits: shorter than that of the ranks, and longer than a refit takes on a busy machine."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("refit") / "hf", seed=6)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Process]:
    """A server with two workers for all tests."""
    process = Process(2)
    yield process
    process.close()


@pytest.fixture
def mortal() -> Iterator[Process]:
    """A server for one test."""
    process = Process(2)
    yield process
    process.close()


def run(ranks2: RankPool, hf: Path, receiver: Process, fault: str, **settings: Any) -> list[dict[str, Any]]:
    settings = {"timeout": PATIENCE, **settings}
    return ranks2.run(refit_ranks.sabotage, str(hf), {"tensor": 2}, receiver.port, fault, settings, timeout=60)


@pytest.mark.parametrize("colocated", [True, False], ids=["memory", "broadcast"])
@pytest.mark.parametrize("fault", ["damaged", "lost"])
def test_a_wrong_byte_or_a_missing_tensor_is_named_and_put_right(
    fault: str, colocated: bool, ranks2: RankPool, hf: Path, receiver: Process, tmp_path: Path
) -> None:
    results = run(ranks2, hf, receiver, fault, version=2, colocated=colocated)
    for result in results:
        assert "refit to version 2 failed on rank 0" in result["error"]
        assert f"tensor {VICTIM} {'is damaged' if fault == 'damaged' else ''}" in result["error"]
        assert "does not answer" not in result["error"]
    assert receiver.client().post("version", {}) is None  # which weights it holds is unknown
    assert "error" not in run(ranks2, hf, receiver, "none", version=2, colocated=colocated)[0]
    assert receiver.client().post("version", {}) == 2
    assert_holds(receiver, hf, tmp_path)


def test_what_the_ranks_give_must_be_the_whole_model(ranks2: RankPool, hf: Path, receiver: Process) -> None:
    for result in run(ranks2, hf, receiver, "incomplete"):
        assert VICTIM in result["error"] and "the ranks own none" in result["error"]


@pytest.mark.parametrize("colocated", [True, False], ids=["memory", "broadcast"])
def test_a_receiver_that_is_killed_is_noticed_at_once(colocated: bool, ranks2: RankPool, hf: Path, mortal: Process) -> None:
    mortal.client().post("fault", {"die_at": VICTIM})
    for result in run(ranks2, hf, mortal, "none", colocated=colocated):
        assert "failed on rank 0, at " in result["error"] and "does not answer" not in result["error"]
    mortal.process.wait(60)


def test_a_receiver_that_hangs_fails_within_the_time_out(ranks2: RankPool, hf: Path, mortal: Process) -> None:
    mortal.client().post("fault", {"stop_at": VICTIM})
    for result in run(ranks2, hf, mortal, "none", bucket_bytes=4000, timeout=TIMEOUT):
        assert "engine 0: it does not answer" in result["error"] and "at model.layers.1." in result["error"]


@pytest.mark.parametrize("fault, rank", [("sender stopped", 0), ("peer stopped", 1)])
def test_a_rank_that_is_stopped_is_named_by_the_others(
    fault: str, rank: int, ranks2: RankPool, hf: Path, receiver: Process
) -> None:
    """The fault is on the sending rank or on one that holds a part of its tensors. The process group alone would report
    neither."""
    waited = rf"rank {rank} does not answer; rank {1 - rank} waited for rank 0, tensor model.layers.1."
    with pytest.raises(RefitError, match=waited):
        run(ranks2, hf, receiver, fault, catch=False, timeout=TIMEOUT)
    assert receiver.client().post("version", {}) is None


def test_a_sender_that_is_killed_leaves_the_engine_unusable_and_alive(
    ranks2: RankPool, hf: Path, receiver: Process, tmp_path: Path
) -> None:
    with pytest.raises(RankDiedError, match="rank 0"):
        run(ranks2, hf, receiver, "sender killed", catch=False)
    assert receiver.client().post("version", {}) is None
    assert "error" not in run(ranks2, hf, receiver, "none")[0]
    assert_holds(receiver, hf, tmp_path)
