"""Whether a path still has the content that a run began with."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from kdrl_mcore.config.resuming import refused
from kdrl_mcore.convert import fingerprint as fingerprint_module
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.run_directory.content import fingerprints, is_same, other_shape
from tests.reference.tiny_models import make_qwen2, make_tokenizer


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_file_is_its_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "x" * 1000)
    assert fingerprint(first) == fingerprint(write(tmp_path / "elsewhere" / "b.jsonl", "x" * 1000))
    assert fingerprint(first) != fingerprint(write(tmp_path / "c.jsonl", "x" * 999 + "y"))
    assert fingerprint("org/no-such-path") is None and fingerprint(None) is None


@pytest.mark.parametrize("place", [0, 500, 999])
def test_a_large_file_is_looked_at_in_three_places(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "WHOLE", 100)
    monkeypatch.setattr(fingerprint_module, "SAMPLE", 10)
    text = "x" * place + "y" + "x" * (999 - place)
    same, other = write(tmp_path / "a", "x" * 1000), write(tmp_path / "b", text)
    assert fingerprint(same) == fingerprint(write(tmp_path / "c", "x" * 1000)) != fingerprint(other)
    assert fingerprint(write(tmp_path / "d", "x" * 1001)) != fingerprint(same)


def test_a_model_is_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    make_qwen2(tmp_path / "model", seed=1, num_layers=1)
    make_tokenizer(tmp_path / "model")
    model = tmp_path / "model"
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    write(copied / "README.md", "about it")
    write(copied / "runs" / "model.safetensors", "of a run that lies in it")
    before = fingerprint(str(model))
    assert fingerprint(str(copied)) == before
    for name in ("model.safetensors", "tokenizer.json"):
        changed = Path(shutil.copytree(model, tmp_path / f"other {name}"))
        (changed / name).write_bytes((changed / name).read_bytes() + b" ")
        assert fingerprint(str(changed)) != before, name
    assert fingerprints({"student.path": str(model), "teacher.path": None, "data.train": "org/name"}) == {
        "student.path": before
    }


def test_paths_of_the_same_content(tmp_path: Path) -> None:
    one, same = write(tmp_path / "x" / "a", "1"), write(tmp_path / "y" / "b", "1")
    other, gone = write(tmp_path / "z" / "a", "2"), str(tmp_path / "gone" / "a")
    key = "data.train"

    def judged(old: str | None, new: str | None, recorded: bool) -> bool:
        saved = fingerprints({key: old}) if recorded else {}
        return is_same(key, old, new, saved, fingerprints({key: new}))

    for recorded in (True, False):
        assert judged(one, same, recorded) and not judged(one, other, recorded) and judged(one, one, recorded)
        assert judged("org/a", "org/a", recorded) and not judged("org/a", "org/b", recorded)
        assert judged(None, None, recorded) and not judged(None, one, recorded)
    assert judged(gone, one, False)  # only the name is known, and it has changed
    assert not judged(gone, same, False)
    assert not is_same(key, one, one, {key: "another content"}, fingerprints({key: one}))


def test_another_shape_is_told_by_its_numbers(tmp_path: Path) -> None:
    for name, settings in {"a": {}, "b": {"hidden_size": 128, "tied": True}, "c": {}}.items():
        make_qwen2(tmp_path / name, seed=1, num_layers=1, **settings)
        make_tokenizer(tmp_path / name)
    (tmp_path / "step_000001").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "step_000001" / "model")
    assert other_shape(tmp_path / "step_000001", str(tmp_path / "a")) is None
    told = other_shape(tmp_path / "step_000001", str(tmp_path / "b")) or ""
    assert "hidden_size 64 -> 128" in told and "tied_embeddings False -> True" in told
    tokenizer = tmp_path / "c" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "a different tokenizer.json" in (other_shape(tmp_path / "step_000001", str(tmp_path / "c")) or "")
    assert other_shape(tmp_path / "nothing", str(tmp_path / "a")) is None


def test_every_source_counts(tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path / "a.jsonl", "1")}, {"path": write(tmp_path / "b.jsonl", "2")}]
    flat = {"data.sources": sources}
    saved = fingerprints(flat)
    assert refused(flat, flat, partial(is_same, saved=saved, present=fingerprints(flat))) == []
    write(tmp_path / "b.jsonl", "3")
    (told,) = refused(flat, flat, partial(is_same, saved=saved, present=fingerprints(flat)))
    assert told.startswith("data.sources=") and "whose content has changed" in told
