"""Models by hub id: a path stays a path, only safetensors are downloaded, the commit is pinned, and failures give one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdrl_mcore.cli.convert import main as convert
from kdrl_mcore.convert.hub import HubId, download, find_commit, hub_id
from kdrl_mcore.errors import ModelError
from tests.reference.tiny_models import make_qwen2, make_tokenizer
from tests.support.hub_server import HubServer, files_of, use_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub on this machine, and an empty cache."""
    with HubServer() as server, use_hub(server.address, tmp_path / "cache"):
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_qwen2(folder, seed=1)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name-1.5B@refs/pr/3", HubId("org/name-1.5B", "refs/pr/3")),
        ("here/model", None),
        ("here/model@main", None),
        ("here/other", None),  # a typing error rather than a model of an organisation with the folder's name
        ("name", None),
        ("/org/name", None),
        ("../org/name", None),
        ("a/b/c", None),
        (f"/x/hub/models--org--na-me/snapshots/{'a1' * 20}", HubId("org/na-me", "a1" * 20)),
    ],
)
def test_what_is_a_hub_id(path: str, found: HubId | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert hub_id(path) == found
    assert found is None or "snapshots" in path or str(found) == path


def test_of_a_model_comes_what_is_read_and_no_code(hub: HubServer, model: Path) -> None:
    files = files_of(model)
    more = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "original/model.safetensors": b"other"}
    first = hub.commit("org/tiny", files | more)
    second = hub.commit("org/tiny", files | {"README.md": b"new"})
    assert find_commit(HubId("org/tiny")) == second and find_commit(HubId("org/tiny", first)) == first
    folder = download(HubId("org/tiny", first))
    assert folder.name == first and files_of(folder) == files
    fetched = {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /org/tiny/resolve")}
    assert fetched == set(files)


def test_what_was_downloaded_is_there_without_a_network(hub: HubServer, model: Path, tmp_path: Path) -> None:
    commit = hub.commit("org/tiny", files_of(model))
    folder = download(HubId("org/tiny"))
    hub.asked.clear()
    with use_hub(hub.address, tmp_path / "cache", offline=True):
        assert find_commit(HubId("org/tiny")) == commit and download(HubId("org/tiny", commit)) == folder
        said = r"org/other is not a folder here; HF_HUB_OFFLINE is set, and .*cache does not hold all of it"
        with pytest.raises(ModelError, match=said):
            find_commit(HubId("org/other"))
    assert hub.asked == []


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("org/nothing", "no repository of this name that you may read"),
        ("org/tiny@v9", "no such revision"),
        ("org/gated", "gated: accept its terms"),
        ("org/pickled", "has no safetensors"),
        ("org/not..allowed", "not a folder here"),
    ],
)
def test_what_cannot_be_had_is_one_line(wanted: str, said: str, hub: HubServer, model: Path) -> None:
    hub.commit("org/tiny", files_of(model))
    hub.commit("org/gated", files_of(model))
    hub.gated.add("org/gated")
    hub.commit("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    found = hub_id(wanted)
    assert found is not None
    with pytest.raises(ModelError, match=said) as caught:
        download(found)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_said(tmp_path: Path) -> None:
    with (
        use_hub("http://127.0.0.1:9", tmp_path),
        pytest.raises(ModelError, match=r"org/tiny is not a folder here; http://127\.0\.0\.1:9 cannot be reached"),
    ):
        find_commit(HubId("org/tiny"))


def test_an_export_is_pushed(hub: HubServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "hf"
    assert convert(["import", "--hf", str(model), "--output", str(checkpoint)]) == 0
    export = ["export", "--checkpoint", str(checkpoint), "--output", str(output), "--push", "org/mine"]
    assert convert([*export, "--private"]) == 0
    commit, files = hub.find("org/mine", None) or ("", {})
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed to {hub.address}/org/mine/commit/{commit}"
    assert files == {name: data for name, data in files_of(output).items() if not name.startswith(".")}
    assert "model.safetensors" in files and hub.private == {"org/mine"}
    shutil.rmtree(output)
    assert convert(export) == 0  # again, into the existing repository
    folder = download(HubId("org/mine", commit))
    assert (folder / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("repository", "said"), [("mine", "write org/name"), ("org/closed", "org/closed cannot be created")])
def test_a_push_that_is_refused_is_refused_before_the_export(
    repository: str, said: str, hub: HubServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.gated.add("org/closed")
    arguments = ["export", "--checkpoint", str(model), "--output", str(tmp_path / "hf"), "--push", repository]
    assert convert(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not (tmp_path / "hf").exists()
