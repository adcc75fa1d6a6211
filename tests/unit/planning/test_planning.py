"""The planner: what it says about published runs, how a plan responds to a change, and that it reports what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kdrl_mcore.cli import plan as plan_tool
from kdrl_mcore.config import ClusterConfig, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.layout import Layout
from kdrl_mcore.parallel.micro_batches import Shape
from kdrl_mcore.parallel.packing import num_rows
from kdrl_mcore.planning import published
from kdrl_mcore.planning.advice import advise
from kdrl_mcore.planning.live import LiveBytes
from kdrl_mcore.planning.memory import GIB, engine_share, fit_engine, kept_micro_batches, plan_engine_share
from kdrl_mcore.planning.passes import idle_experts
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.rates import NETWORK, Rates
from kdrl_mcore.planning.savings import savings, with_config
from kdrl_mcore.planning.search import search
from kdrl_mcore.planning.setup import Engines, find_engines, make_setup, shard_requests
from kdrl_mcore.planning.shards import find_shape, try_shards
from kdrl_mcore.planning.summary import summarise
from kdrl_mcore.planning.workload import Workload, packing, workload_of
from kdrl_mcore.preflight import configuration
from kdrl_mcore.preflight.findings import CheckFailed
from tests.support import ROOT

RUN = ["experiment=kdrl_32b", "cluster=h100"]
EMBEDDED = ["rollout=megatron"]
VLLM = ["rollout=vllm", "rollout.vllm.tensor=4"]
SERVERS = [*VLLM, "rollout.vllm.placement=server", "cluster.server_nodes=4"]
LLAMA_70B = "models/DeepSeek-R1-Distill-Llama-70B"
EXPERTS = ["student.path=Qwen3-30B-A3B", "teacher.path=Qwen3-32B", "parallel.pipeline=1", "parallel.expert=8", *VLLM]
MOE_ACT = "parallel.recompute_modules=[moe_act]"
NORMS = "parallel.recompute_modules=[layernorm]"
SELECTIVE_NORMS = ["parallel.recompute=selective", NORMS]

pytestmark = pytest.mark.timeout(300)


def planned(*overrides: str) -> Plan:
    config = load_config([*RUN, *overrides])
    return make_plan(make_setup(config, workload_of(config)))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """One fake world for all plans of this file."""
    configs = [load_config(run.overrides.split()) for run in published.RUNS]
    # The run itself, and what is tried if it does not fit.
    changes = [[], EMBEDDED, VLLM, ["rollout.vllm.tensor=1"], EXPERTS, SELECTIVE_NORMS]
    changes += [["experiment=paper_1p5b"], ["experiment=paper_zero_3b", "teacher.path=models/Qwen2.5-7B"]]
    changes.append(["experiment=kdrl_70b", f"teacher.path={LLAMA_70B}"])
    changes += [[f"parallel.{key}"] for key in ("tensor=16", "pipeline=4", "context=2")]
    configs += [load_config([*RUN, *change]) for change in changes]
    try_shards([request for config in configs for request in shard_requests(config, 128).values()])


def test_the_table_of_published_runs_is_what_the_planner_says() -> None:
    assert published.markdown() in (ROOT / "docs" / "planning.md").read_text()


def test_the_plan_of_32b_fits_and_adds_up() -> None:
    plan = planned()
    assert plan.fits and len(plan.memory) == 2
    assert plan.seconds == pytest.approx(sum(phase.seconds.total for phase in plan.phases))
    assert plan.gpu_hours == pytest.approx(300 * 128 * plan.seconds / 3600)
    assert [phase.name for phase in plan.phases] == ["rollout", "refit", "reward", "teacher", "training", "checkpoint"]


def test_a_checkpoint_takes_its_share_of_each_nodes_host_memory() -> None:
    """14 bytes per weight, over 16 nodes; the fuller of the two stages counts."""
    plan = planned()
    fuller = max(stage.parameters for stage in plan.setup.student.shard.stages)
    assert plan.checkpoint_host_bytes == pytest.approx(14 * fuller)  # 8 replicas, 8 ranks on a node
    assert plan.checkpoint_host_bytes == pytest.approx(14 * plan.setup.student.parameters / 16, rel=0.02)
    assert planned("optimizer.name=sgd").checkpoint_host_bytes == pytest.approx(6 / 14 * plan.checkpoint_host_bytes)
    whole = planned("parallel.distributed_optimizer=false")  # its replicas share the writing too
    assert whole.checkpoint_host_bytes == plan.checkpoint_host_bytes
    assert planned("checkpoint.every=-1").checkpoint_host_bytes == 0
    assert planned(*EXPERTS).checkpoint_host_bytes == pytest.approx(14 * 30.5e9 / 16, rel=0.02)


def test_each_measure_moves_what_it_should() -> None:
    plan = planned(*EMBEDDED)
    masked = planned(*EMBEDDED, "objective.kd.mask=response")
    assert masked.phase("teacher").total == pytest.approx(0.4 * plan.phase("teacher").total, rel=0.1)
    kept = planned(*EMBEDDED, "parallel.recompute=none")
    assert kept.phase("training").total < plan.phase("training").total and kept.peak > plan.peak
    away = planned(*EMBEDDED, "optimizer.offload=true")
    assert away.memory[0].at("rollout") < plan.memory[0].at("rollout")
    assert away.memory[0].at("update") == plan.memory[0].at("update")
    assert planned("batch.updates_per_step=2").phase("old policy").total > 0
    scores = planned("objective.kd.token_weight.kind=entropy").phase("scores").total
    assert 0.2 < scores / planned().phase("training").total < 0.5
    pairs = planned("rollout.responses_per_prompt=2")  # fewer than half of them have both a correct and an incorrect response
    for rounds, times in ((0, 1), (1, 2), (3, 3)):
        more = planned(f"rollout.group_filter.rounds={rounds}", "rollout.responses_per_prompt=2")
        assert more.phase("rollout").total == pytest.approx(times * pairs.phase("rollout").total)
    whole = planned().phase("teacher").total
    assert planned("objective.combine.kind=gate").phase("teacher").total < whole
    assert planned("objective.kd.token_weight.kind=prefix").phase("teacher").total < 0.7 * whole  # half of each response
    assert planned("objective.combine.kind=ratio", "rollout.responses_per_prompt=2").phase("teacher").total < 0.6 * whole
    exact = planned("objective.kd.estimator=exact")
    given = planned("objective.kd.estimator=exact", "rollout.given.share=0.5")
    assert given.phase("rollout").total == exact.phase("rollout").total
    for phase in ("teacher", "training"):
        assert 1.8 < given.phase(phase).total / exact.phase(phase).total < 2.1
    assert summarise(given)["responses"] == 2 * summarise(exact)["responses"]


def test_a_plan_that_does_not_fit_names_a_change_that_helps() -> None:
    plan = planned(*EMBEDDED, "rollout.responses_per_prompt=64", "rollout.max_sequences=256")
    assert not plan.fits
    lines = advise(plan)
    assert "DOES NOT FIT" in lines[1] and "KV cache" in lines[1]
    assert any("rollout.max_sequences=128" in line for line in lines)
    assert with_config(plan, lambda config: setattr(config.rollout, "max_sequences", 128)).fits


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*EXPERTS, MOE_ACT, "model.spec=local"], "needs Transformer Engine"),
        ([*EXPERTS, MOE_ACT, "model.dtype=float32"], "needs Transformer Engine"),
        ([MOE_ACT], "no experts: name mlp"),
        ([NORMS, "model.spec=transformer_engine"], "contain the norms"),
    ],
)
def test_what_the_run_would_refuse_to_recompute_is_not_planned(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        planned("parallel.recompute=selective", *overrides)


def test_advice_says_where_the_layers_decide_whether_a_run_is_refused() -> None:
    lines = [line for line in advise(planned(*SELECTIVE_NORMS)) if "refused" in line]
    assert len(lines) == 1 and lines[0].startswith("Where Transformer Engine can be used, the run is refused: ")
    assert not any("refused" in line for line in advise(planned(*SELECTIVE_NORMS, "model.spec=local")))


def test_generation_beside_training_takes_the_longer_of_both() -> None:
    run = published.RUNS[1].plan()
    rollout, refit = run.phase("rollout").total, run.phase("refit").total
    rest = sum(phase.seconds.total for phase in run.phases) - rollout - refit
    assert run.seconds == pytest.approx(max(rollout, rest) + refit)


def test_engines_are_where_the_configuration_puts_them() -> None:
    colocated = planned(*VLLM, "rollout.vllm.gpu_memory_utilization=0.6")
    engine = colocated.setup.engine
    assert engine is not None and (engine.layout.data, colocated.setup.gpus) == (32, 128) and colocated.fits
    for rank in colocated.memory:
        assert sum(item.bytes for item in rank.items if item.kind in ("rollout engine", "KV cache")) == 0.6 * 80 * GIB
    full = planned(*VLLM, "rollout.vllm.gpu_memory_utilization=0.95")  # in addition to what training holds
    assert not full.fits and any("rollout.vllm.gpu_memory_utilization=0.7" in line for line in advise(full))
    fitted = fit_engine(full.setup)
    assert make_plan(fitted).fits and fit_engine(colocated.setup) == colocated.setup and engine_share(fitted) < 0.95
    few = planned(*VLLM, "rollout.vllm.gpu_memory_utilization=0.6", "rollout.max_sequences=8")
    assert few.phase("rollout").total > 1.5 * colocated.phase("rollout").total

    servers = planned(*SERVERS)  # two engines on each node
    engine = servers.setup.engine
    assert engine is not None and (engine.layout.data, servers.setup.engine_gpus, servers.setup.gpus) == (8, 32, 160)
    assert servers.memory[-1].name == "servers" and servers.memory[-1].peak == pytest.approx(0.85 * 80 * GIB)
    assert not any(item.kind == "KV cache" for item in servers.memory[0].items)
    found = find_engines(load_config([*RUN, *VLLM, "rollout.vllm.placement=server", "rollout.vllm.replicas=6"]), 128)
    assert found == Engines(6, 4, 24)
    for overrides, message in ((["rollout.vllm.replicas=99"], "99 times"), (["rollout.vllm.tensor=3"], "tensor=3 do not fit")):
        with pytest.raises(ConfigError, match=message):
            planned(*VLLM, *overrides)


@pytest.mark.parametrize(
    ("overrides", "world_size", "share"), [([], 128, 0.71), (["experiment=kdrl_70b", f"teacher.path={LLAMA_70B}"], 256, 0.69)]
)
def test_a_colocated_engine_takes_what_training_leaves(overrides: list[str], world_size: int, share: float) -> None:
    config = load_config([*RUN, *overrides])
    plan = make_plan(make_setup(config, workload_of(config)))
    assert engine_share(plan.setup) == plan_engine_share(config, world_size, 80.0) == share
    kept = max(rank.between_steps for rank in plan.memory)  # weights, gradients, optimizer, and what sleeping engines keep
    assert plan.fits and kept + (share + 0.01) * 80 * GIB > 0.95 * 80 * GIB
    more = load_config([*RUN, *overrides, "optimizer.offload=true"])
    assert plan_engine_share(more, world_size, 80.0) > share
    given = load_config([*RUN, *overrides, "rollout.vllm.gpu_memory_utilization=0.85"])
    assert plan_engine_share(given, world_size, 80.0) == 0.85 and not make_plan(make_setup(given, workload_of(given))).fits


def test_an_engine_that_training_leaves_no_room_for_is_refused_in_one_line() -> None:
    config = load_config([*RUN, "rollout.vllm.tensor=1"])  # 61 GiB of weights
    with pytest.raises(
        ConfigError, match=r"training leaves 71% of 80 GiB .* which needs 6\d\.\d GiB .* raise rollout.vllm.tensor"
    ):
        plan_engine_share(config, 128, 80.0)


def test_vllm_is_planned_to_sample_faster_than_the_embedded_engine_where_that_is_the_default() -> None:
    """Launching a layer's kernels one by one takes longer than reading its weights."""
    for overrides in ([], ["experiment=paper_1p5b"], ["experiment=paper_zero_3b", "teacher.path=models/Qwen2.5-7B"]):
        vllm, embedded = planned(*overrides), planned(*overrides, *EMBEDDED)
        assert vllm.setup.engine is not None and embedded.setup.engine is None
        assert vllm.phase("rollout").total < 0.75 * embedded.phase("rollout").total


def test_a_measure_saves_the_same_whether_it_is_on_or_off() -> None:
    plans = {on: planned(*SERVERS, f"rollout.steps_ahead={on}") for on in (0, 1)}
    kept = {on: {each.name: each for each in savings(plan)} for on, plan in plans.items()}
    off, on = kept[0]["one-step-off generation"], kept[1]["one-step-off generation"]
    assert (off.on, on.on) == (False, True) and on.seconds == pytest.approx(off.seconds)
    assert off.seconds == pytest.approx(plans[0].seconds - plans[1].seconds) and off.seconds > 0
    assert planned(*SERVERS, "rollout.steps_ahead=1", "rollout.partial_tokens=64").hidden == 0  # sampled before the step trains
    early = planned(*SERVERS, "teacher.score_while_sampling=true")
    shorter = plans[0].seconds - early.seconds
    assert kept[0]["teacher while servers sample"].seconds == pytest.approx(shorter)
    assert shorter == pytest.approx(early.hidden) and 0.1 < early.hidden / early.phase("teacher").total <= 1
    assert planned(*SERVERS, "teacher.score_while_sampling=true", "batch.micro_tokens=99999999").hidden == 0  # no part is full
    assert kept[1]["teacher while servers sample"].seconds is None
    saved = {each.name: each for each in savings(planned(*EMBEDDED))}
    assert saved["one-step-off generation"].seconds is None and "server" in saved["one-step-off generation"].note
    assert saved["recompute"].on and saved["recompute"].bytes > 0 > saved["recompute"].seconds
    assert not saved["optimizer off-load"].on and saved["optimizer off-load"].bytes > 0
    assert saved["teacher pruned by mask"].seconds == pytest.approx(
        planned().seconds - planned("objective.kd.mask=response").seconds
    )
    assert saved["micro-batching by memory"].bytes > GIB and saved["token-balanced packing"].seconds > 0
    assert saved["no old-policy pass on-policy"].seconds == pytest.approx(
        planned("batch.updates_per_step=2").phase("old policy").total
    )
    assert saved["overlapped parameter gathering"].seconds == 0  # the refit follows and reads the weights
    four = planned("batch.updates_per_step=4", "parallel.overlap_grad_reduce=true")
    gathers = {each.name: each for each in savings(four)}["overlapped parameter gathering"]
    assert not gathers.on and 0 < gathers.seconds < four.phase("training")[NETWORK]
    hidden = planned("batch.updates_per_step=4", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    assert four.seconds - hidden.seconds == pytest.approx(gathers.seconds)


def test_an_engine_of_experts_reads_those_that_its_sequences_are_sent_to() -> None:
    setup = planned(*EXPERTS).setup
    assert setup.engine is not None and setup.student.parameters == pytest.approx(30.5e9, rel=0.01)
    stage = setup.engine.shard.stages[0]
    assert stage.parameters * 4 == pytest.approx(setup.student.parameters, rel=0.05)  # split over four GPUs, experts too
    assert idle_experts(setup.engine, stage.experts, 1) == pytest.approx(stage.experts * 120 / 128)
    assert idle_experts(setup.engine, stage.experts, 1000) < 1


def test_search_finds_layouts_that_fit_fastest_first() -> None:
    small = ["model.dtype=bfloat16", "student.path=Qwen2.5-3B", "objective=grpo", "cluster=h100", "cluster.gpus_per_node=2"]
    small.append("rollout.max_response_tokens=2048")
    config = load_config(small)
    found, looked_at = search(config, workload_of(config))
    assert looked_at > len(found) > 1 and all(candidate.plan.fits for candidate in found)
    seconds = [candidate.plan.seconds for candidate in found]
    assert seconds == sorted(seconds)
    again = load_config([*small, *found[0].overrides])
    assert make_plan(make_setup(again, workload_of(again))).seconds == pytest.approx(seconds[0])


def test_the_tool_prints_a_plan_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_tool.main([*RUN, "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    answer = json.loads((tmp_path / "plan.json").read_text())
    assert f"a checkpoint takes {answer['checkpoint_host_bytes'] / GIB:.1f} GiB of each node's host memory" in shown
    assert "peak" in shown and f"{answer['seconds']:.1f} s per iteration" in shown
    assert all(each["name"] in shown for each in answer["measures"]) and len(answer["measures"]) == 13
    for overrides, message in (
        (["experiment=kdrl_32b"], "add cluster=h100"),
        ([*RUN, "student.path=nowhere"], "student.path=nowhere has no config.json"),
        ([*RUN, "cluster.nodes=3"], "24 ranks cannot hold replicas"),
    ):
        assert plan_tool.main(overrides) == ConfigError.exit_code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_relative_path_of_a_model_means_the_folder_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is built in a process with another working directory."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_shape("student", "student.path") == str(tmp_path / "student")


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
    assert rates.link(1e9, 4, 4) == pytest.approx(across / 2)  # each node has two GPUs of the group, each with its adapter
    assert rates.ring(1e9, 1, 1) == 0


def test_the_1f1b_schedule_keeps_fewer_micro_batches_on_later_stages() -> None:
    assert [kept_micro_batches(4, stage, 8, None) for stage in range(4)] == [4, 3, 2, 1]
    assert kept_micro_batches(4, 0, 2, None) == 2
    assert kept_micro_batches(4, 3, 8, 2) == 2.5


def test_packing_is_the_trainers() -> None:
    packed = packing(tuple(Shape(index, 0, length) for index, length in enumerate((100, 60, 40, 20))), Layout(2), 100)
    assert (packed.tokens, packed.micro_batches, packed.largest, packed.stall) == (120, 2, 100, 1.0)
    with pytest.raises(ConfigError, match="do not describe a batch"):
        Workload(4, 10, 100, 50)


def test_shared_prompts_are_planned_once() -> None:
    """Rows and the pairs of tokens that attention processes, counted one by one."""
    workload = Workload(responses=8, prompt_tokens=100, response_tokens=20, longest=30)
    for sharing in (1, 4):
        shapes = workload.shapes(sharing)
        prompts = 8 // sharing
        lengths = [shape.response for shape in shapes]
        rows = prompts * 100 + sum(lengths)
        pairs = prompts * 100**2 / 2 + sum(100 * length + length**2 / 2 for length in lengths)
        assert workload.rows(sharing) == num_rows(shapes) == rows
        assert workload.attended(sharing) == pytest.approx(pairs / rows)


@pytest.mark.parametrize(("gib", "message"), [(80, None), (24, "kdrl-plan")])
def test_the_preflight_makes_the_same_plan(gib: int, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(configuration, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(configuration, "gather_objects", lambda item: [item])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 128)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    config = load_config(["experiment=kdrl_32b"])
    config.student.path, config.teacher.path = "DeepSeek-R1-Distill-Qwen-32B", "Skywork-OR1-32B"
    if message is None:
        assert f"{planned().peak / GIB:.1f} GiB" in configuration.check_memory(config)
    else:
        with pytest.raises(CheckFailed, match=message):
            configuration.check_memory(config)


def test_a_student_that_teaches_itself_loads_no_teacher() -> None:
    """The earlier weights need 4 bytes per parameter, shared by the replicas; a longer prompt costs time."""
    own = [
        *EMBEDDED,
        "teacher.path=null",
        "teacher.parallel.tensor=1",
        "teacher.parallel.pipeline=1",
        "teacher.weights=average",
        "teacher.offload=false",
    ]
    plan, present = planned(*own), planned(*own[:-1], "teacher.weights=present", "teacher.prompt.template=chat")
    items = {item.kind: item.bytes for item in plan.memory[0].items}
    setup = plan.setup
    largest, layout = max(stage.parameters for stage in setup.student.shard.stages), setup.student.layout
    assert "teacher" not in items and items["earlier weights"] == 4 * largest / (layout.data * layout.context)
    assert "earlier weights" not in {item.kind for item in present.memory[0].items}
    assert plan.phase("teacher").total > present.phase("teacher").total > 0
    tokens = load_config(RUN).rollout.max_prompt_tokens
    longer = planned(
        *own[:-1], "teacher.weights=present", "teacher.prompt.template=chat", f"teacher.prompt.max_tokens={4 * tokens}"
    )
    assert longer.phase("teacher").total > 1.1 * present.phase("teacher").total
    assert summarise(plan)["teacher"] == {"path": summarise(plan)["student"]["path"], "parameters": setup.student.parameters}


def test_several_teachers_take_turns_on_the_gpu_and_stay_in_host_memory() -> None:
    alone = planned()
    settings, section = alone.setup.config.teacher, "teachers.{}"
    layout = f"parallel: {{tensor: {settings.parallel.tensor}, pipeline: {settings.parallel.pipeline}}}"
    both = [f"{section.format(name)}={{path: {settings.path}, {layout}}}" for name in ("a", "b")]
    both += ["teacher.path=null", "teacher.parallel.tensor=1", "teacher.parallel.pipeline=1"]

    def bytes_of(plan: Plan) -> dict[str, float]:
        return {item.kind: item.bytes for item in plan.memory[-1].items if item.kind.split()[0] == "teacher"}

    together = planned(*both)
    assert bytes_of(together) == bytes_of(alone) and together.teacher_host_bytes == pytest.approx(2 * alone.teacher_host_bytes)
    assert together.phase("teacher").total == pytest.approx(2 * alone.phase("teacher").total)
    resident = planned(*both, "teachers.a.offload=false", "teachers.b.offload=false")
    held = bytes_of(alone)["teacher"]
    assert bytes_of(resident) == {"teacher a": held, "teacher b": held} and resident.teacher_host_bytes == 0
    assert resident.memory[-1].between_steps == pytest.approx(together.memory[-1].between_steps + 2 * held)
    exact = [planned(*words, "objective.kd.estimator=exact") for words in ([], both)]
    assert bytes_of(exact[1])["teacher head"] == 2 * bytes_of(exact[0])["teacher head"]
    domains = "data.sources=[{path: a.jsonl, name: x}, {path: b.jsonl, name: y}]"
    shared = planned(*both, "data.train=null", domains, "teachers.a.values=[x]", "teachers.b.values=[y]")
    assert shared.phase("teacher").total < 0.8 * together.phase("teacher").total
