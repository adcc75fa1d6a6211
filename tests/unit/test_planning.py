"""The planner: what it says of published runs, how a plan answers to a change, and that it says what does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdrl_mcore import preflight
from kdrl_mcore.config import ClusterConfig, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.planning import published
from kdrl_mcore.planning.advice import advise, with_config
from kdrl_mcore.planning.live import LiveBytes
from kdrl_mcore.planning.memory import GIB, kept_micro_batches
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.rates import Rates
from kdrl_mcore.planning.search import search
from kdrl_mcore.planning.setup import Choices, make_setup, shard_requests
from kdrl_mcore.planning.shards import get_shards
from kdrl_mcore.planning.workload import Workload, packing, workload_of
from tools import plan as plan_tool

ROOT = Path(__file__).resolve().parents[2]
RUN = ["experiment=kdrl_32b", "cluster=h100"]

pytestmark = pytest.mark.timeout(300)


def planned(*overrides: str, choices: Choices = Choices()) -> Plan:  # noqa: B008
    config = load_config([*RUN, *overrides])
    return make_plan(make_setup(config, workload_of(config), choices))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """One faked world for all plans of this file."""
    configs = [load_config(run.overrides.split()) for run in published.RUNS] + [load_config(RUN)]
    get_shards([request for config in configs for request in shard_requests(config, 64, Choices()).values()])


def test_the_table_of_published_runs_is_what_the_planner_says() -> None:
    assert published.markdown() in (ROOT / "docs" / "planning.md").read_text()


def test_the_plan_of_32b_fits_and_adds_up() -> None:
    plan = planned()
    assert plan.fits and len(plan.memory) == 2
    assert plan.seconds == pytest.approx(sum(phase.seconds.total for phase in plan.phases))
    assert plan.gpu_hours == pytest.approx(300 * 128 * plan.seconds / 3600)
    assert [phase.name for phase in plan.phases] == ["rollout", "refit", "reward", "teacher", "training", "checkpoint"]


def test_each_measure_moves_what_it_should() -> None:
    plan = planned()
    masked = planned("objective.kd.mask=response")
    assert masked.phase("teacher").total == pytest.approx(0.4 * plan.phase("teacher").total, rel=0.1)
    kept = planned("parallel.recompute=none")
    assert kept.phase("training").total < plan.phase("training").total and kept.peak > plan.peak
    away = planned("optimizer.offload=true")
    assert away.memory[0].at("rollout") < plan.memory[0].at("rollout")
    assert away.memory[0].at("update") == plan.memory[0].at("update")
    assert planned("batch.updates_per_step=2").phase("old policy").total > 0


def test_a_plan_that_does_not_fit_names_a_change_that_helps() -> None:
    plan = planned("rollout.responses_per_prompt=64", "rollout.max_sequences=256")
    assert not plan.fits
    lines = advise(plan)
    assert "DOES NOT FIT" in lines[1] and "KV cache" in lines[1]
    assert any("rollout.max_sequences=128" in line for line in lines)
    assert with_config(plan, lambda config: setattr(config.rollout, "max_sequences", 128)).fits


def test_generation_beside_training_takes_the_longer_of_both() -> None:
    run = published.RUNS[1].plan()
    rollout, refit = run.phase("rollout").total, run.phase("refit").total
    rest = sum(phase.seconds.total for phase in run.phases) - rollout - refit
    assert run.seconds == pytest.approx(max(rollout, rest) + refit)


def test_search_finds_layouts_that_fit_fastest_first() -> None:
    small = ["model.dtype=bfloat16", "student.path=Qwen2.5-3B", "objective=grpo", "cluster=h100", "cluster.gpus_per_node=2"]
    small.append("rollout.max_response_tokens=2048")
    config = load_config(small)
    found, looked_at = search(config, workload_of(config), Choices())
    assert looked_at > len(found) > 1 and all(candidate.plan.fits for candidate in found)
    seconds = [candidate.plan.seconds for candidate in found]
    assert seconds == sorted(seconds)
    again = load_config([*small, *found[0].overrides])
    assert make_plan(make_setup(again, workload_of(again), Choices())).seconds == pytest.approx(seconds[0])


def test_the_tool_prints_a_plan_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_tool.main(RUN) == 0
    assert "peak" in capsys.readouterr().out
    for overrides, message in (
        (["experiment=kdrl_32b"], "add cluster=h100"),
        ([*RUN, "student.path=nowhere"], "student.path=nowhere has no config.json"),
        ([*RUN, "cluster.nodes=3"], "24 ranks cannot hold replicas"),
    ):
        assert plan_tool.main(overrides) == ConfigError.exit_code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_live_bytes_follow_allocations() -> None:
    given = torch.ones(10)
    with LiveBytes() as live:
        made = given * 2
        view = made[:5]
        del made
        assert live.now == 40
        del view
        assert (live.now, live.peak) == (0, 40)
        given.add_(1)
        assert live.now == 0


def test_links_know_nodes() -> None:
    rates = Rates(ClusterConfig(peak_tflops=1, node_gbs=400, network_gbs=50))
    within, across = rates.link(1e9, 8, 1), rates.link(1e9, 2, 8)
    assert across == pytest.approx(8 * within)
    assert rates.link(1e9, 4, 4) == pytest.approx(across / 2)  # two GPUs of the group on each node, each with its adapter
    assert rates.ring(1e9, 1, 1) == 0


def test_the_1f1b_schedule_keeps_fewer_micro_batches_on_later_stages() -> None:
    assert [kept_micro_batches(4, stage, 8, None) for stage in range(4)] == [4, 3, 2, 1]
    assert kept_micro_batches(4, 0, 2, None) == 2
    assert kept_micro_batches(4, 3, 8, 2) == 2.5


def test_packing_is_the_trainers() -> None:
    from kdrl_mcore.parallel.layout import Layout

    packed = packing((100, 60, 40, 20), Layout(2), 100)
    assert (packed.tokens, packed.micro_batches, packed.largest, packed.stall) == (120, 2, 100, 1.0)
    with pytest.raises(ConfigError, match="do not describe a batch"):
        Workload(4, 10, 100, 50)


@pytest.mark.parametrize(("gib", "message"), [(80, None), (40, "tools/plan.py")])
def test_the_preflight_makes_the_same_plan(gib: int, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(preflight, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(preflight, "_gather", lambda item: [item])
    monkeypatch.setattr(preflight.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(preflight.dist, "get_world_size", lambda: 128)
    monkeypatch.setattr(preflight.dist, "broadcast_object_list", lambda *_, **__: None)
    config = load_config(["experiment=kdrl_32b"])
    config.student.path, config.teacher.path = "DeepSeek-R1-Distill-Qwen-32B", "Skywork-OR1-32B"
    if message is None:
        assert f"{planned().peak / GIB:.1f} GiB" in preflight.check_memory(config)
    else:
        with pytest.raises(preflight.CheckFailed, match=message):
            preflight.check_memory(config)
