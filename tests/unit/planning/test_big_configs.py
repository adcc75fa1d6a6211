"""The experiments that nobody can run on a laptop, built rank by rank in a fake world of their real size: an error in such a
config is found by a test and not on 128 GPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.planning.host_memory import num_parameters
from kdrl_mcore.planning.plan import make_plan
from kdrl_mcore.planning.setup import Choices, make_setup
from kdrl_mcore.planning.shards import ShardRequest, get_shards
from kdrl_mcore.planning.workload import workload_of
from tests.support import ROOT

CONFIGS = ROOT / "kdrl_mcore" / "planning" / "shapes"
EXPERIMENTS = {
    "paper_1p5b": ("DeepSeek-R1-Distill-Qwen-1.5B", "Skywork-OR1-Math-7B", 8),
    "paper_zero_3b": ("Qwen2.5-3B", "Qwen2.5-7B", 8),
    "kdrl_32b": ("DeepSeek-R1-Distill-Qwen-32B", "Skywork-OR1-32B", 128),
    "kdrl_70b": ("DeepSeek-R1-Distill-Llama-70B", "DeepSeek-R1-Distill-Llama-70B", 256),
}
"""Student, teacher, and number of GPUs."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model directories with only the published config."""
    folder = tmp_path_factory.mktemp("models")
    for path in CONFIGS.glob("*/config.json"):
        shutil.copytree(path.parent, folder / path.parent.name)
    return folder


def overrides_of(experiment: str, models: Path) -> list[str]:
    """The experiment with the models of a folder."""
    student, teacher, _ = EXPERIMENTS[experiment]
    return [f"experiment={experiment}", f"student.path={models}/{student}", f"teacher.path={models}/{teacher}"]


@pytest.fixture(scope="module")
def worlds(models: Path) -> dict[str, list[dict[str, Any]]]:
    """What the ranks of each experiment hold; they are built in a separate process."""
    overrides = [json.dumps(overrides_of(experiment, models)) for experiment in EXPERIMENTS]
    command = [sys.executable, "-m", "tests.support.big_config_world", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    built = {name: json.loads(line) for name, line in zip(EXPERIMENTS, done.stdout.splitlines(), strict=True)}
    assert all(built.values()), done.stderr[-3000:]
    return built


def hf_tensors(config_file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published checkpoint, from the model in transformers."""
    hf = AutoConfig.from_pretrained(config_file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied parameters count once
    return shapes


def homeless(ranks: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The tensors of which a row or column is missing, held twice, or outside."""
    places: dict[str, set[tuple[int, int, int]]] = defaultdict(set)
    for rank in ranks:
        for name, dim, start, length in rank["slices"]:
            places[name].add((dim, start, start + length))
    wrong = [name for name in places if name not in shapes]
    for name, shape in shapes.items():
        cuts = sorted(places[name])
        dims = {dim for dim, _, _ in cuts}
        ends = [0, *(stop for _, _, stop in cuts)]
        tiles = len(dims) == 1 and [start for _, start, _ in cuts] == ends[:-1] and ends[-1] == shape[min(dims)]
        if not tiles:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_student_teacher_and_optimizer_build_on_every_rank_and_every_tensor_has_a_home(
    experiment: str, models: Path, worlds: dict[str, list[dict[str, Any]]]
) -> None:
    ranks = worlds[experiment]
    for role, name in zip(("student", "teacher"), EXPERIMENTS[experiment], strict=False):
        replica = [rank[role] for rank in ranks if rank[role]["replica"] == 0]
        assert homeless(replica, hf_tensors(models / name)) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_optimizer_state_is_shared_by_the_replicas(
    experiment: str, models: Path, worlds: dict[str, list[dict[str, Any]]]
) -> None:
    config = load_config(overrides_of(experiment, models))
    replicas = world_size(config) // (config.parallel.tensor * config.parallel.pipeline)
    assert replicas > 1
    for rank in worlds[experiment]:
        share = rank["student"]["parameters"] / replicas
        assert abs(rank["optimized"] - share) <= 0.01 * share


NEW_GROUPS = {"paper_1p5b": 7, "paper_zero_3b": 7, "kdrl_32b": 115, "kdrl_70b": 367}
"""Calls on every rank that make a process group, for student and teacher. Each costs a message to the store, and for a member a
communicator or threads."""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_process_groups_are_made_once(experiment: str, worlds: dict[str, list[dict[str, Any]]]) -> None:
    assert {rank["new_groups"] for rank in worlds[experiment]} == {NEW_GROUPS[experiment]}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_config_asks_for_the_gpus_it_says_and_fits_them(experiment: str, models: Path) -> None:
    config = load_config([*overrides_of(experiment, models), "cluster=h100"])
    assert world_size(config) == EXPERIMENTS[experiment][2]
    plan = make_plan(make_setup(config, workload_of(config), Choices()))
    assert plan.fits


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_planner_counts_the_parameters_that_ranks_hold(
    experiment: str, models: Path, worlds: dict[str, list[dict[str, Any]]]
) -> None:
    config = load_config([*overrides_of(experiment, models), "cluster=h100"])
    setup = make_setup(config, workload_of(config), Choices())
    assert setup.teacher is not None
    for rank in worlds[experiment]:
        for role, model in (("student", setup.student), ("teacher", setup.teacher)):
            stage = rank["rank"] // (world_size(config) // model.layout.pipeline)
            assert rank[role]["parameters"] == model.shard.stages[stage].parameters


def test_the_planner_counts_the_parameters_of_layers_with_and_without_experts(models: Path) -> None:
    path = models / "GLM-4.5-Air"
    (shard,) = get_shards([ShardRequest(str(path), "bfloat16", pipeline=2, expert=8)])
    experts = sum(stage.experts for stage in shard.stages)
    assert sum(stage.parameters for stage in shard.stages) + 7 * experts == num_parameters(read_architecture(path))
    assert shard.stages[0].experts * 23 == shard.stages[1].experts * 22  # the first of 46 layers has none


@pytest.mark.parametrize("name", sorted(path.parent.name for path in CONFIGS.glob("*/config.json")))
def test_the_preflight_counts_the_parameters_of_published_models(name: str, models: Path) -> None:
    counted = sum(int(torch.Size(shape).numel()) for shape in hf_tensors(models / name).values())
    assert num_parameters(read_architecture(models / name)) == counted


def world_size(config: Config) -> int:
    """The number of GPUs."""
    return config.cluster.nodes * config.cluster.gpus_per_node
