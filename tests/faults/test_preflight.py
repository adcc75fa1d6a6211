"""The preflight finds on the ranks what would end the job later, and names it; what one rank finds, all ranks know."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks import RankPool
from tests.zoo import Zoo

NAMES = ["versions", "devices", "models", "layout", "engines", "data", "memory", "run.dir", "all-reduce"]


def overrides_of(zoo: Zoo, run: Path) -> list[str]:
    """Of a run that replays, which every check finds good."""
    paths = {"run.dir": run, "student.path": zoo.model("untied"), "teacher.path": zoo.model("teacher")}
    return ["rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", *(f"{key}={path}" for key, path in paths.items())]


def findings_on_rank(overrides: list[str], min_bandwidth: float = 0.0) -> list[tuple[str, bool, str]]:
    """Each check's name, whether it is good, and what it says."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.config import load_config
    from kdrl_mcore.preflight import run_checks

    findings = run_checks(load_config(overrides), min_bandwidth)
    return [(finding.name, finding.good, finding.text) for finding in findings]


def bad_text(findings: list[list[tuple[str, bool, str]]], name: str) -> str:
    """What the first bad check says, on every rank the same."""
    assert all(each == findings[0] for each in findings)
    first, text = next((found, text) for found, good, text in findings[0] if not good)
    assert first == name, text
    return text


def test_a_good_run_passes_every_check_and_leaves_nothing_behind(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    for findings in ranks2.run(findings_on_rank, overrides_of(zoo, tmp_path / "run")):
        assert [(name, good) for name, good, _ in findings] == [(name, True) for name in NAMES], findings
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def without_a_tensor(zoo: Zoo, folder: Path) -> list[str]:
    model = Path(shutil.copytree(zoo.model("untied"), folder / "untied"))
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return [f"student.path={model}"]


def without_a_tokenizer(zoo: Zoo, folder: Path) -> list[str]:
    model = Path(shutil.copytree(zoo.model("untied"), folder / "untied"))
    (model / "tokenizer.json").unlink()
    return ["rollout=megatron", "rollout.path=null", "objective=grpo", "data.train=some/hub-id", f"student.path={model}"]


def a_file_in_the_way(zoo: Zoo, folder: Path) -> list[str]:
    (folder / "file").touch()
    return [f"run.dir={folder}/file"]


SPOILED: dict[str, tuple[Callable[[Zoo, Path], list[str]], str, list[str]]] = {
    "no such teacher": (lambda zoo, folder: ["teacher.path=/no/such/model"], "models", ["/no/such/model"]),
    "missing tensor": (without_a_tensor, "models", ["untied", "model.layers.2.mlp.up_proj.weight"]),
    "no tokenizer": (without_a_tokenizer, "models", ["has no tokenizer.json"]),
    "layout": (lambda zoo, folder: ["parallel.tensor=3"], "layout", ["2 ranks", "tensor 3"]),
    "teacher's layout": (lambda zoo, folder: ["teacher.parallel.pipeline=4"], "layout", ["2 ranks", "pipeline 4"]),
    "no data": (lambda zoo, folder: ["data.train=/no/such.jsonl"], "data", ["/no/such.jsonl is not on"]),
    "run directory": (a_file_in_the_way, "run.dir", ["cannot write", "file"]),
}


@pytest.mark.parametrize(("change", "name", "words"), SPOILED.values(), ids=list(SPOILED))
def test_a_run_that_cannot_work_is_found(
    change: Callable[[Zoo, Path], list[str]], name: str, words: list[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    overrides = [*overrides_of(zoo, tmp_path / "run"), *change(zoo, tmp_path)]
    text = bad_text(ranks2.run(findings_on_rank, overrides), name)
    assert [word for word in words if word not in text] == [], text


def test_transformer_engine_that_must_serve_and_cannot_is_found(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    overrides = [*overrides_of(zoo, tmp_path / "run"), "model.spec=transformer_engine"]
    assert "model.spec=transformer_engine, but on " in bad_text(ranks2.run(findings_on_rank, overrides), "versions")


def test_a_slow_network_is_found(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    text = bad_text(ranks2.run(findings_on_rank, overrides_of(zoo, tmp_path), 1e6), "all-reduce")
    assert "GB/s, less than 1e+06" in text and "slurm/network.sh" in text


def findings_with_a_bad_rank(overrides: list[str], trouble: str) -> list[tuple[str, bool, str]]:
    """On a rank: the checks, where rank 1 has some trouble of its own."""
    import torch.distributed as dist

    from kdrl_mcore import preflight

    with ExitStack() as stack:
        stack.enter_context(patch.object(preflight, "SHARED_WITHIN_SECONDS", 0.5))
        if dist.get_rank() == 1:
            stack.enter_context(TROUBLES[trouble]())
        return findings_on_rank(overrides)


@contextmanager
def _another_version() -> Iterator[None]:
    from kdrl_mcore import preflight

    right = preflight.version
    with patch.object(preflight, "version", lambda package: "0.1" if package == "torch" else right(package)):
        yield


@contextmanager
def _a_disk_of_its_own() -> Iterator[None]:
    from kdrl_mcore import preflight

    right = preflight.check_run_dir
    with patch.object(preflight, "check_run_dir", lambda run_dir: right(run_dir.with_name("elsewhere"))):
        yield


@contextmanager
def _a_wrong_sum() -> Iterator[None]:
    import torch.distributed as dist

    right = dist.all_reduce

    def wrong(tensor: Any, *args: Any, **kwargs: Any) -> None:
        right(tensor, *args, **kwargs)
        tensor.add_(1)

    with patch.object(dist, "all_reduce", wrong):
        yield


TROUBLES = {"version": _another_version, "disk": _a_disk_of_its_own, "sum": _a_wrong_sum}


@pytest.mark.parametrize(
    ("trouble", "name", "words"),
    [
        ("version", "versions", ["torch is ", "and 0.1 on ", "same environment"]),
        ("disk", "run.dir", ["does not see what another node wrote", "run.dir"]),
        ("sum", "all-reduce", ["rank 1 on ", "wrong sum"]),
    ],
)
def test_a_node_unlike_the_others_is_found(
    trouble: str, name: str, words: list[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    text = bad_text(ranks2.run(findings_with_a_bad_rank, overrides_of(zoo, tmp_path / "run"), trouble), name)
    assert [word for word in words if word not in text] == [], text


def gpu_findings(overrides: list[str], gpus: int, gib: float) -> list[tuple[str, bool, str]]:
    """On a rank: the checks of the GPUs, on a node that shows so many of such a size."""
    import torch

    from kdrl_mcore import preflight
    from kdrl_mcore.config import load_config

    config = load_config(overrides)
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    with ExitStack() as stack:
        shown: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "device_count": lambda: gpus,
            "get_device_properties": lambda *_: properties,
            "get_device_name": lambda *_: "a GPU",
        }
        for name, answer in shown.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(preflight, "device", lambda: torch.device("cpu")))
        checks = {"devices": preflight.check_devices, "memory": preflight.check_memory}
        findings = [preflight._finding(name, partial(check, config)) for name, check in checks.items()]
    return [(finding.name, finding.good, finding.text) for finding in findings]


def test_too_few_gpus_and_too_little_memory_are_found(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    overrides = overrides_of(zoo, tmp_path)
    devices, memory = ranks2.run(gpu_findings, overrides, 2, 80.0)[1]
    assert devices == ("devices", True, "1 nodes with [2] x a GPU, 80 GiB") and memory[1], memory
    assert "shows 1 GPUs for 2 ranks" in bad_text(ranks2.run(gpu_findings, overrides, 1, 80.0), "devices")
    assert "tools/plan.py" in bad_text(ranks2.run(gpu_findings, overrides, 2, 0.001), "memory")
