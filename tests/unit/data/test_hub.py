"""A run with hub ids: one rank per machine downloads, all train from the same commit, and the run directory says which one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from kdrl_mcore.config import SourceConfig, domain_name
from kdrl_mcore.data.files import name_of, read_rows
from kdrl_mcore.errors import DataError, ModelError
from tests.support.hub_server import HubServer, files_of, use_hub


def resolve_on_rank(address: str, cache: Path, paths: dict[str, str], seconds: float) -> tuple[Any, int]:
    """What each rank gets, and how often it downloaded; a download takes this number of seconds."""
    from kdrl_mcore.data import hub

    downloads = []
    right = hub.download

    def download(model: Any, **settings: Any) -> Path:
        downloads.append(model)
        time.sleep(seconds)
        return right(model, **settings)

    with use_hub(address, cache), patch.object(hub, "download", download):
        return hub.resolve(paths), len(downloads)


def test_one_rank_downloads_and_all_have_the_folder(zoo: Any, ranks2: Any, tmp_path: Path) -> None:
    with HubServer() as server:
        commit = server.commit("org/tiny", files_of(zoo.model("untied")))
        paths = {"student.path": "org/tiny", "teacher.path": str(zoo.model("teacher"))}
        answers = ranks2.run(resolve_on_rank, server.address, tmp_path / "cache", paths, 0.5)
        assert [downloads for _, downloads in answers] == [1, 0]
        ((folders, commits), _), second = answers
        assert second[0] == (folders, commits) and commits == {"student.path": f"org/tiny@{commit}"}
        assert folders.keys() == commits.keys() and files_of(Path(folders["student.path"])) == files_of(zoo.model("untied"))
        with pytest.raises(ModelError, match=r"teacher\.path: org/nothing is not a folder here"):
            ranks2.run(resolve_on_rank, server.address, tmp_path / "cache", {"teacher.path": "org/nothing"}, 0.0)
        server.commit("org/pickled", {"config.json": b"{}"})
        with pytest.raises(ModelError, match=r"org/pickled@.* on the hub has no safetensors"):
            ranks2.run(resolve_on_rank, server.address, tmp_path / "cache", {"teacher.path": "org/pickled"}, 0.0)


def train_on_rank(address: str, cache: Path, offline: bool, overrides: Sequence[str]) -> int:
    from kdrl_mcore.cli.train import main

    with use_hub(address, cache, offline=offline):
        return main(list(overrides))


def test_a_run_by_hub_id_says_its_commit_and_resumes_without_a_network(zoo: Any, ranks1: Any, tmp_path: Path) -> None:
    run, train = tmp_path / "run", tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "response": str(i + 1)} for i in range(8)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        *("objective=sft", "trainer.self_test=false", "logging.progress=false", "logging.tensorboard=false"),
        *("student.path=org/tiny", f"run.dir={run}", "checkpoint.export_hf=false", "rollout.prompts_per_step=2"),
        *("data.template=plain", f"data.train={train}"),
    ]
    with HubServer() as server:
        commit = server.commit("org/tiny", files_of(zoo.model("untied")))
        place = (server.address, tmp_path / "cache")
        assert ranks1.run(train_on_rank, *place, False, [*common, "trainer.steps=1"]) == [0]
        assert ranks1.run(train_on_rank, *place, True, [*common, "trainer.steps=2"]) == [0]
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["hub"] for start in starts] == [{"student.path": f"org/tiny@{commit}"}] * 2
    assert [start["step"] for start in starts] == [0, 1] and not any("student" in change for change in starts[1]["changes"])
    assert f"models--org--tiny/snapshots/{commit}" in (run / "config.yaml").read_text()


def test_a_data_set_is_read_at_its_revision_or_not_at_all(tmp_path: Path) -> None:
    def problems(source: str, *, offline: bool = False) -> list[str]:
        with use_hub(server.address, tmp_path / "cache", offline=offline):
            return [row.values["prompt"] for row in read_rows(source, ["prompt"], "train", None)]

    rows = [json.dumps({"prompt": text}).encode() + b"\n" for text in "abc"]
    with HubServer() as server:
        first = server.commit("datasets/org/maths", {"train.jsonl": b"".join(rows[:1])})
        second = server.commit("datasets/org/maths", {"train.jsonl": b"".join(rows)})
        assert problems("org/maths") == ["a", "b", "c"]
        assert problems(f"org/maths@{first}") == ["a"]
        assert problems(f"org/maths@{first}", offline=True) == ["a"]
        with pytest.raises(DataError, match=f"newest commit in the cache is {first}"):
            problems(f"org/maths@{second}", offline=True)
        with pytest.raises(DataError, match=f"name a commit, not a branch or tag: the cache holds {first}"):
            problems("org/maths@v1", offline=True)
        with pytest.raises(DataError, match="v1"):
            problems("org/maths@v1")


def test_a_revision_is_no_part_of_a_name() -> None:
    for source, name in (("org/maths@v1.0", "maths"), ("org/maths@refs/pr/3", "maths"), ("a@2/set@3.jsonl.gz", "set@3")):
        assert name_of(source) == name
        assert domain_name(SourceConfig(path=source)) == name
