"""A teacher on servers trains as the dense reference does, in layouts that treat its scores differently, alone and beside a
teacher in the job; a server that stops ends the run in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_mcore.errors import TeacherError
from tests.reference.tiny_models import write_jsonl
from tests.support.agreement import SETTINGS, Case, about, check, overrides_of
from tests.support.completions_server import completions_server, log_probs_of
from tests.support.ranks import RankPool
from tests.support.training import FAST, PROBE, metrics_of, objective_overrides, train_on_rank
from tests.support.zoo import TOKENS, Zoo

TOP_K = replace(SETTINGS, estimator="top_k", top_k=7, top_k_support="teacher")
CASES = {
    "k2, tp2": Case(2, "parallel.tensor=2 teacher.server.concurrency=1 teacher.server.batch_tokens=40", SETTINGS),
    "forward with a bucket, tp2 pp2": Case(
        4, "parallel.tensor=2 parallel.pipeline=2", replace(TOP_K, divergence="forward", mask="response")
    ),
    "corrected reverse, cp2": Case(2, "parallel.context=2", replace(TOP_K, top_k_tail="corrected")),
    "jsd, weights by log-ratios, dp2": Case(
        2, "batch.micro_tokens=40", replace(TOP_K, divergence="jsd", token_weight="magnitude", share=0.5)
    ),
}


@pytest.fixture(scope="module")
def servers(zoo: Zoo) -> Iterator[list[str]]:
    """Two servers of the teacher, and one of another one."""
    first, other = (log_probs_of(zoo.model(name), TOKENS) for name in ("teacher", "granite"))
    with (
        completions_server(first, token=None) as one,
        completions_server(first, token=None) as two,
        completions_server(other, token=None) as three,
    ):
        yield [one, two, three]


def served(section: str, *urls: str) -> str:
    return f"{section}.server.kind=completions {section}.server.urls=[{','.join(urls)}]"


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_served_teacher_agrees_with_the_dense_reference(
    case: Case, servers: Sequence[str], zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check(replace(case, overrides=f"{case.overrides} {served('teacher', *servers[:2])}"), zoo, pools[case.ranks], tmp_path)


@pytest.mark.parametrize("settings", [SETTINGS, TOP_K], ids=["k2", "top_k"])
def test_teachers_on_servers_teach_beside_each_other_and_beside_those_in_the_job(
    settings: object, servers: Sequence[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    rows = [{**row, "domain": "ab"[index % 2]} for index, row in enumerate(zoo.rows("uneven"))]
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    every = [f"student.path={zoo.model('untied')}", "rollout=replay", f"rollout.path={tmp_path / 'rollouts.jsonl'}"]
    every += [*objective_overrides(settings), *PROBE, *FAST, "parallel.tensor=2", "data.shuffle=false"]  # type: ignore[arg-type]
    every += ["teachers.a.values=[a]", "teachers.b.values=[b]", "teachers.b.share.init=0.5"]
    every += [f"teachers.a.path={zoo.model('teacher')}", f"teachers.b.path={zoo.model('granite')}"]
    elsewhere = [served("teachers.b", servers[2])] + ([served("teachers.a", servers[0])] if settings is TOP_K else [])
    found = []
    for name, more in (("job", []), ("servers", " ".join(elsewhere).split())):
        outcomes = ranks2.run(train_on_rank, [*every, *more, f"run.dir={tmp_path / name}"])
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        found.append(metrics_of(tmp_path / name)[0])
    for name in ("loss", "kd_loss", "grad_norm", "teacher/a/kl", "teacher/b/kl", "teacher/b/tokens"):
        assert found[1][name] == about(found[0][name]), name


def test_a_server_that_stops_ends_the_run_in_one_line(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    with completions_server(log_probs_of(zoo.model("teacher"), TOKENS), token=None, answers=4) as address:
        overrides = [
            *overrides_of(zoo, tmp_path, "untied"),
            "trainer.steps=9",
            "teacher.server.attempts=1",
            "checkpoint.every=1",
        ]
        overrides += [*served("teacher", address).split(), f"teacher.path={zoo.model('teacher')}"]
        outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes[0].stderr
    every = "".join(outcome.stderr for outcome in outcomes)  # the first rank that ends writes it
    (line,) = [line for line in every.splitlines() if line.startswith("error:")]
    assert "no teacher's server scores prompt" in line and f"{address}: status 500" in line


def preflight_on_rank(overrides: Sequence[str]) -> str:
    """What the preflight says of the teachers' servers."""
    from kdrl_mcore.config import load_config
    from kdrl_mcore.preflight.configuration import check_teachers

    return check_teachers(load_config(list(overrides)))


def test_the_preflight_asks_the_servers(servers: Sequence[str], zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    overrides = [*overrides_of(zoo, tmp_path, "untied"), *served("teacher", servers[0]).split()]
    assert ranks1.run(preflight_on_rank, overrides) == ["teacher: teacher"]
    top_k = ["objective.kd.estimator=top_k", "objective.kd.top_k_support=teacher", "objective.kd.top_k=21"]
    with pytest.raises(TeacherError, match="greater than max allowed: 20"):
        ranks1.run(preflight_on_rank, [*overrides, *top_k])
    later = [*overrides, "teacher.server.urls=[]"]
    assert ranks1.run(preflight_on_rank, later) == ["teacher: servers in RUN/teachers, checked when the run starts"]
