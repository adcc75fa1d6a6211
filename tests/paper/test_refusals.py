"""Paper CUDA refuses what CUDA refuses or would corrupt, allows everything else, and counts correctly."""

from __future__ import annotations

import pytest

from tests.support.paper_programs import PROGRAMS, count_syncs, measure_memory, run_program, share_memory
from tests.support.ranks import RankPool


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_the_wrong_program_is_refused(name: str, paper1: RankPool) -> None:
    assert paper1.run(run_program, name, True) == [None]
    (refusal,) = paper1.run(run_program, name, False)
    assert refusal is not None and PROGRAMS[name][2] in refusal


def test_host_syncs_are_counted(paper1: RankPool) -> None:
    (counts,) = paper1.run(count_syncs)
    free = {"fill a mask", "all-gather", "repeat by counts, size given", "repeat", "full", "pinned copy", "arithmetic"}
    assert counts == {name: int(name not in free) for name in counts}


def test_the_ledger_counts_bytes_that_are_alive(paper1: RankPool) -> None:
    assert paper1.run(measure_memory) == [{"made": 2**20, "kept": 2**20, "end": 0, "peak": 2**20}]


def test_a_cuda_ipc_handle_is_the_same_memory(paper1: RankPool) -> None:
    assert paper1.run(share_memory) == [12.0]
