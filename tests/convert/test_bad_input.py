"""A damaged or unsupported source, or an output that cannot be written, gives one clear line and no output folder."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdrl_mcore.convert.byte_ranges import Files
from kdrl_mcore.convert.convert import import_hf
from tests.reference.tiny_models import make_model
from tests.support import ROOT
from tests.support.hf_folders import quiet

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    return make_model("qwen2", tmp_path_factory.mktemp("good") / "hf", seed=8, max_shard_size="100KB")


@pytest.fixture(scope="module")
def converted(good: Path) -> Path:
    """`good`, imported."""
    import_hf(good, good.parent / "megatron", None, quiet)
    return good.parent / "megatron"


def edit_tensors(hf: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the first file, and the index with it."""
    file = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((hf / INDEX).read_text())
    kept = {name: where for name, where in index["weight_map"].items() if where != file.name}
    (hf / INDEX).write_text(json.dumps({**index, "weight_map": {**kept, **dict.fromkeys(tensors, file.name)}}))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.embed_tokens.weight"]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)


def reshape_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()


def quantize_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)


def mix_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()


def change_config(hf: Path, **values: object) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, **values}))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.path),)


def only_pickles(hf: Path) -> None:
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(hf.parent / "exploded"))))


def first_file(hf: Path) -> Path:
    return sorted(hf.glob("*.safetensors"))[0]


def hide_a_file(hf: Path) -> None:
    first_file(hf).unlink()


def misplace_a_tensor(hf: Path) -> None:
    index = json.loads((hf / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embed_tokens.weight"] = files[-1]
    (hf / INDEX).write_text(json.dumps(index))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda hf: truncate(first_file(hf)), "model-00001.*damaged or cut short"),
    "header cut": (lambda hf: os.truncate(first_file(hf), 5), "damaged or cut short"),
    "missing tensor": (lambda hf: edit_tensors(hf, drop_one), "has no tensor model.embed_tokens.weight"),
    "extra tensor": (lambda hf: edit_tensors(hf, add_one), "has a tensor that its architecture does not have: .*o_proj.bias"),
    "wrong shape": (lambda hf: edit_tensors(hf, reshape_one), "embed_tokens.weight has shape .66, 64., but its config"),
    "quantized": (lambda hf: edit_tensors(hf, quantize_one), "embed_tokens.weight is I8"),
    "mixed dtypes": (
        lambda hf: edit_tensors(hf, mix_dtypes),
        "mixes torch.bfloat16 and torch.float32: choose one with --dtype",
    ),
    "absent file": (hide_a_file, f"{INDEX} names model-00001.*does not exist"),
    "misplaced tensor": (misplace_a_tensor, f"{INDEX} says that model.embed_tokens.weight is in"),
    "index that is no JSON": (lambda hf: (hf / INDEX).write_text("{"), f"{INDEX} is not a valid index"),
    "file elsewhere": (
        lambda hf: (hf / INDEX).write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}})),
        "not a file next to it",
    ),
    "unknown architecture": (lambda hf: change_config(hf, architectures=["MambaForCausalLM"]), "MambaForCausalLM.*supported:"),
    "remote code": (lambda hf: change_config(hf, auto_map={"AutoModel": "x.Y"}), "remote code is never run"),
    "quantization": (lambda hf: change_config(hf, quantization_config={"bits": 4}), "quantization_config"),
    "only pickles": (only_pickles, "only pickled weights .pytorch_model.bin., which are never loaded"),
    "no weights": (lambda hf: [file.unlink() for file in hf.glob("*.safetensors*")], "has no weights"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_source_is_refused_on_one_line(
    what: str, good: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = BAD[what]
    hf = Path(shutil.copytree(good, tmp_path / "hf"))
    spoil(hf)
    code = tool.main(["import", "--hf", str(hf), "--output", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 1 and line.startswith("error: ") and "Traceback" not in line
    assert re.search(says, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def spoil_pickle(folder: Path) -> None:
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(Bomb(str(folder.parent / "exploded"))))


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated file": (lambda c: os.truncate(c / "release" / "__0_0.distcp", 5000), "damaged or cut short|is cut short"),
    "absent file": (lambda c: (c / "release" / "__0_0.distcp").unlink(), "__0_0.distcp, which holds .* does not exist"),
    "no metadata": (lambda c: (c / "release" / ".metadata").unlink(), "it has no .metadata"),
    "metadata cut short": (lambda c: os.truncate(c / "release" / ".metadata", 500), ".metadata is damaged"),
    "metadata that would run code": (spoil_pickle, ".metadata is damaged, or is not checkpoint metadata: it names"),
    "no such iteration": (lambda c: (c / "latest_checkpointed_iteration.txt").write_text("7"), "names 7, which does not exist"),
    "another shape": (lambda c: change_config(c, intermediate_size=80), "has shape .*, but its config.json gives"),
    "more layers": (lambda c: change_config(c, num_hidden_layers=5, layer_types=None), "has shape|has no tensor|does not hold"),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
@pytest.mark.parametrize("command", ["export", "verify"])
def test_a_bad_checkpoint_is_refused_on_one_line(
    command: str, what: str, good: Path, converted: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = BAD_CHECKPOINTS[what]
    checkpoint = Path(shutil.copytree(converted, tmp_path / "checkpoint"))
    spoil(checkpoint)
    rest = ["--output", str(tmp_path / "out")] if command == "export" else ["--hf", str(good)]
    code = tool.main([command, "--checkpoint", str(checkpoint), *rest])
    written = capsys.readouterr()
    assert code == 1
    if command == "export" or written.err.strip().splitlines()[-1].startswith("error: "):
        assert re.search(says, written.err.strip().splitlines()[-1]), written.err
    else:
        assert "different" in written.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_difference_of_one_bit_is_found(
    good: Path, converted: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = Path(shutil.copytree(good, tmp_path / "hf"))

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].view(torch.int32)[5, 7] ^= 1

    edit_tensors(hf, flip)
    assert tool.main(["verify", "--hf", str(good), "--checkpoint", str(converted)]) == 0
    assert "51 equal, 0 cast, 0 missing, 0 different" in capsys.readouterr().out
    assert tool.main(["verify", "--hf", str(hf), "--checkpoint", str(converted)]) == 1
    out = capsys.readouterr().out
    assert "50 equal, 0 cast, 0 missing, 1 different" in out
    assert f"different: model.embed_tokens.weight: the first difference is at its byte {(5 * 64 + 7) * 4}" in out


def test_a_missing_tensor_is_told_from_a_different_one(good: Path, converted: Path, tmp_path: Path, tool: ModuleType) -> None:
    hf = Path(shutil.copytree(good, tmp_path / "hf"))
    edit_tensors(hf, drop_one)
    assert tool.main(["verify", "--hf", str(hf), "--checkpoint", str(converted)]) == 1


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    assert tool.main(["import", "--hf", str(good), "--output", str(tmp_path / "out")]) == 1
    assert "no space is left on the device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_half_way_leaves_nothing(good: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the kernel refuses a write in the middle."""
    limit = 60_000
    run = subprocess.run(
        [sys.executable, "tools/convert_hf.py", "import", "--hf", str(good), "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("error: ") and "no space is left" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_an_interruption_half_way_leaves_nothing(
    command: str,
    good: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, written = Files.copy, []

    def copy_then_stop(*arguments: Any) -> None:
        copy(*arguments)
        written.append(arguments)
        if len(written) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Files, "copy", copy_then_stop)
    source = ["--hf", str(good)] if command == "import" else ["--checkpoint", str(converted)]
    code = tool.main([command, *source, "--output", str(tmp_path / "out"), "--threads", "1"])
    assert code == 130 and "interrupted" in capsys.readouterr().err
    assert len(written) >= 10 and list(tmp_path.iterdir()) == []
