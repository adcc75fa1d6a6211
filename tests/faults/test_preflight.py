"""The preflight finds and names on the ranks what would end the job later; what one rank finds, all ranks report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file, save_file

from tests.reference.tiny_models import write_jsonl
from tests.support.commands import PREFLIGHT_CHECKS, findings_on_rank, preflight_overrides
from tests.support.ranks import RankPool
from tests.support.zoo import Zoo


def bad_text(findings: list[list[tuple[str, bool, str]]], name: str) -> str:
    """The message of the first failed check is the same on every rank."""
    assert all(each == findings[0] for each in findings)
    first, text = next((found, text) for found, good, text in findings[0] if not good)
    assert first == name, text
    return text


def test_a_good_run_passes_every_check_and_leaves_nothing_behind(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    for findings in ranks2.run(findings_on_rank, preflight_overrides(zoo, tmp_path / "run")):
        assert [(name, good) for name, good, _ in findings] == [(name, True) for name in PREFLIGHT_CHECKS], findings
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


def sampling(zoo: Zoo, folder: Path) -> list[str]:
    train = write_jsonl(folder / "train.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    return ["rollout=megatron", "rollout.path=null", "data.template=plain", f"data.train={train}"]


def long_prompts(zoo: Zoo, folder: Path) -> list[str]:
    return [*sampling(zoo, folder), "rollout.max_response_tokens=510"]


def long_evaluation(zoo: Zoo, folder: Path) -> list[str]:
    held_out = write_jsonl(folder / "held_out.jsonl", [{"prompt": "1+" * 250 + "1=", "answer": "251"}])
    return [*sampling(zoo, folder), f"data.eval={held_out}"]


def long_rollouts(zoo: Zoo, folder: Path) -> list[str]:
    row = zoo.rows("one")[0] | {"response_token_ids": [7] * 600, "sampler_log_probs": [-1.0] * 600}
    return [f"rollout.path={write_jsonl(folder / 'long.jsonl', [row])}"]


def foreign_rollouts(zoo: Zoo, folder: Path) -> list[str]:
    rows = deepcopy(zoo.rows("uneven"))
    rows[2]["response_token_ids"][-1] = 64
    return [f"rollout.path={write_jsonl(folder / 'foreign.jsonl', rows)}"]


def with_another_head(zoo: Zoo, folder: Path) -> list[str]:
    model = Path(shutil.copytree(zoo.model("tied"), folder / "tied"))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return [f"student.path={model}"]


def with_an_old_file(zoo: Zoo, folder: Path) -> list[str]:
    model = Path(shutil.copytree(zoo.model("untied"), folder / "untied"))
    shutil.copy(model / "model.safetensors", model / "model-00002-of-00002.safetensors")
    return [f"student.path={model}"]


def a_foreign_export(zoo: Zoo, folder: Path) -> list[str]:
    (folder / "run" / "hf").mkdir(parents=True)
    (folder / "run" / "hf" / "thesis.txt").write_text("irreplaceable")
    return []


SPOILED: dict[str, tuple[Callable[[Zoo, Path], list[str]], str, list[str]]] = {
    "no such teacher": (lambda zoo, folder: ["teacher.path=/no/such/model"], "models", ["/no/such/model"]),
    "missing tensor": (without_a_tensor, "models", ["untied", "model.layers.2.mlp.up_proj.weight"]),
    "no tokenizer": (without_a_tokenizer, "models", ["has no tokenizer.json"]),
    "layout": (lambda zoo, folder: ["parallel.tensor=3"], "layout", ["2 ranks", "tensor 3"]),
    "teacher's layout": (lambda zoo, folder: ["teacher.parallel.pipeline=4"], "layout", ["2 ranks", "pipeline 4"]),
    "nothing to recompute": (
        lambda zoo, folder: ["parallel.recompute=selective", "parallel.recompute_modules=[moe_act]"],
        "layout",
        ["moe_act does nothing here", "name mlp"],
    ),
    "no data": (lambda zoo, folder: ["data.train=/no/such.jsonl"], "data", ["/no/such.jsonl is not on"]),
    "prompts beyond the positions": (long_prompts, "lengths", ["train.jsonl row 1", "rollout.max_response_tokens=510", "512"]),
    "evaluated beyond the positions": (long_evaluation, "lengths", ["held_out row 1", "502 tokens", "512"]),
    "rollouts beyond the positions": (long_rollouts, "lengths", ["long.jsonl line 1", "512 positions"]),
    "rollouts of other tokens": (foreign_rollouts, "lengths", ["foreign.jsonl line 3", "token id 64"]),
    "a head that is not tied": (with_another_head, "models", ["lm_head.weight", "tie_word_embeddings=true"]),
    "an old file": (with_an_old_file, "models", ["holds model-00002-of-00002.safetensors", "remove"]),
    "a foreign export": (a_foreign_export, "models", ["run/hf holds thesis.txt"]),
    "no such model on the hub": (
        lambda zoo, folder: ["student.path=nobody/nothing"],
        "hub",
        ["student.path", "nobody/nothing"],
    ),
    "no such logger": (lambda zoo, folder: ["logging.loggers=['no.where:Logger']"], "loggers", ["no.where", "not installed"]),
    "run directory": (a_file_in_the_way, "run.dir", ["cannot write", "file"]),
}


@pytest.mark.parametrize(("change", "name", "words"), SPOILED.values(), ids=list(SPOILED))
def test_a_run_that_cannot_work_is_found(
    change: Callable[[Zoo, Path], list[str]], name: str, words: list[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    overrides = [*preflight_overrides(zoo, tmp_path / "run"), *change(zoo, tmp_path)]
    text = bad_text(ranks2.run(findings_on_rank, overrides), name)
    assert [word for word in words if word not in text] == [], text


def test_transformer_engine_that_must_serve_and_cannot_is_found(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    overrides = [*preflight_overrides(zoo, tmp_path / "run"), "model.spec=transformer_engine"]
    assert "model.spec=transformer_engine, but on " in bad_text(ranks2.run(findings_on_rank, overrides), "versions")


def test_a_slow_network_is_found(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    text = bad_text(ranks2.run(findings_on_rank, preflight_overrides(zoo, tmp_path), 1e6), "all-reduce")
    assert "GB/s, less than 1e+06" in text and "slurm/network.sh" in text


def findings_with_a_bad_rank(overrides: list[str], trouble: str) -> list[tuple[str, bool, str]]:
    """On a rank: the checks, when only rank 1 has a fault."""
    import torch.distributed as dist

    from kdrl_mcore.preflight import machine

    with ExitStack() as stack:
        stack.enter_context(patch.object(machine, "SHARED_WITHIN_SECONDS", 0.5))
        if dist.get_rank() == 1:
            stack.enter_context(TROUBLES[trouble]())
        return findings_on_rank(overrides)


@contextmanager
def _another_version() -> Iterator[None]:
    from kdrl_mcore.preflight import machine

    right = machine.version
    with patch.object(machine, "version", lambda package: "0.1" if package == "torch" else right(package)):
        yield


@contextmanager
def _a_disk_of_its_own() -> Iterator[None]:
    from kdrl_mcore.preflight import machine

    right = machine.check_run_dir
    with patch.object(machine, "check_run_dir", lambda run_dir: right(run_dir.with_name("elsewhere"))):
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


@contextmanager
def _little_memory() -> Iterator[None]:
    from kdrl_mcore.planning import host_memory

    with patch.object(host_memory, "free_memory", lambda: 2**20):
        yield


TROUBLES = {"version": _another_version, "disk": _a_disk_of_its_own, "sum": _a_wrong_sum, "memory": _little_memory}


@pytest.mark.parametrize(
    ("trouble", "name", "words"),
    [
        ("version", "versions", ["torch is ", "and 0.1 on ", "same environment"]),
        ("disk", "run.dir", ["does not see what another node wrote", "run.dir"]),
        ("memory", "memory", ["has 0.0 GiB of free memory", "2 rank(s) need more than", "student.lora.rank"]),
        ("sum", "all-reduce", ["rank 1 on ", "wrong sum"]),
    ],
)
def test_a_node_unlike_the_others_is_found(
    trouble: str, name: str, words: list[str], zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    text = bad_text(ranks2.run(findings_with_a_bad_rank, preflight_overrides(zoo, tmp_path / "run"), trouble), name)
    assert [word for word in words if word not in text] == [], text


def gpu_findings(overrides: list[str], gpus: int, gib: float) -> list[tuple[str, bool, str]]:
    """On a rank: the checks of the GPUs, on a node that shows this number of GPUs of this size."""
    import torch

    from kdrl_mcore.config import load_config
    from kdrl_mcore.preflight import configuration, machine
    from kdrl_mcore.preflight.findings import find

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
        for module in (configuration, machine):
            stack.enter_context(patch.object(module, "device", lambda: torch.device("cpu")))
        checks = {"devices": machine.check_devices, "memory": configuration.check_memory}
        findings = [find(name, partial(check, config)) for name, check in checks.items()]
    return [(finding.name, finding.good, finding.text) for finding in findings]


def test_too_few_gpus_and_too_little_memory_are_found(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    overrides = preflight_overrides(zoo, tmp_path)
    devices, memory = ranks2.run(gpu_findings, overrides, 2, 80.0)[1]
    assert devices == ("devices", True, "1 nodes with [2] x a GPU, 80 GiB") and memory[1], memory
    assert "shows 1 GPUs for 2 ranks" in bad_text(ranks2.run(gpu_findings, overrides, 1, 80.0), "devices")
    assert "kdrl-plan" in bad_text(ranks2.run(gpu_findings, overrides, 2, 0.001), "memory")
