"""A teacher on a server of hidden states trains as the dense reference does, where log-probs would not suffice; other models
and wrong tokens are refused."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.agreement import SETTINGS, Case, check, overrides_of
from tests.support.ranks import RankPool
from tests.support.training import train_on_rank
from tests.support.zoo import Zoo

STATES = {
    "exact, tp2 pp2": Case(4, "parallel.tensor=2 parallel.pipeline=2", replace(SETTINGS, estimator="exact", temperature=0.7)),
    "top_k of the student, cp2 dp2": Case(
        4, "parallel.context=2 batch.micro_tokens=40", replace(SETTINGS, estimator="top_k", top_k=7, mask="response")
    ),
    "k3, weights by the teacher's entropy": Case(
        4, "parallel.tensor=2", replace(SETTINGS, estimator="k3", token_weight="teacher_entropy")
    ),
}


def serve_states_on_rank(arguments: Sequence[str], stop: Path) -> int:
    """`kdrl-serve-teacher --kind hidden_states` on one of its ranks, which a signal would stop, until the file exists."""
    from kdrl_mcore.cli import serve_states

    def stop_when_there(number: int, handler: Callable[..., None]) -> None:
        def watch() -> None:
            while not stop.exists():
                time.sleep(0.05)
            handler(number)

        if callable(handler):
            threading.Thread(target=watch, daemon=True).start()

    token = patch.dict(os.environ, {"KDRL_TEACHER_TOKEN": "secret"})
    with patch.object(serve_states.signal, "signal", stop_when_there), token:
        return serve_states.main(list(arguments))


@pytest.fixture(scope="module")
def state_server(zoo: Zoo, ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file with the address of a server of two ranks that returns hidden states."""
    run, codes = tmp_path_factory.mktemp("states"), list[int]()
    arguments = ["--model", str(zoo.model("teacher")), "--run-dir", str(run), "--tensor", "2", "--dtype", "float32"]
    thread = threading.Thread(target=lambda: codes.extend(ranks2.run(serve_states_on_rank, arguments, run / "stop")))
    thread.start()
    address = run / "teachers" / "teacher-0.json"
    while not address.exists():
        assert thread.is_alive()
        time.sleep(0.05)
    yield address
    (run / "stop").touch()
    thread.join()
    assert codes == [0, 0]


@pytest.mark.parametrize("case", STATES.values(), ids=list(STATES))
def test_hidden_states_of_a_server_agree_with_the_dense_reference(
    case: Case, state_server: Path, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "teachers").mkdir(parents=True)
    (run / "teachers" / "teacher-0.json").write_bytes(state_server.read_bytes())
    check(replace(case, overrides=f"{case.overrides} teacher.server.kind=hidden_states"), zoo, pools[case.ranks], run)


def test_a_server_of_hidden_states_that_is_not_the_teacher_is_refused(
    state_server: Path, zoo: Zoo, ranks1: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    overrides = [*overrides_of(zoo, tmp_path, "untied"), "teacher.server.kind=hidden_states"]
    overrides += [f"teacher.server.urls=[{json.loads(state_server.read_text())['url']}]"]

    def told(*more: str) -> str:
        (outcome,) = ranks1.run(train_on_rank, [*overrides, *more])
        assert outcome.code == 1
        return outcome.stderr

    assert "refuses the token" in told()
    mine = [f"teacher.server.token_file={tmp_path / 'token'}", f"teacher.path={zoo.model('granite')}"]
    assert "serves another model (fingerprint" in told(*mine)
