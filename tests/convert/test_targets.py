"""Files that this program did not write are never replaced, its own only on request, and a source is never a target."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kdrl_mcore.convert.convert import export_hf_folder, import_hf
from kdrl_mcore.convert.targets import MARK, check_target, replacing_folder
from kdrl_mcore.errors import ModelError
from tests.reference.tiny_models import make_model
from tests.support.hf_folders import quiet
from tests.support.ranks import RankPool
from tests.support.training import QUIET, train_on_rank
from tests.support.zoo import Zoo


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("targets") / "hf", seed=8, num_hidden_layers=1)


@pytest.fixture(scope="module")
def converted(hf: Path) -> Path:
    import_hf(hf, hf.parent / "megatron", None, quiet)
    return hf.parent / "megatron"


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def a_model(folder: Path) -> Path:
    """Somebody's model, with a config like ours."""
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").write_text("{}")
    (folder / "mine" / "model.safetensors").write_text("months of work")
    return folder / "mine"


def a_note(folder: Path) -> Path:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("irreplaceable")
    return folder / "mine"


def a_link(folder: Path) -> Path:
    (folder / "mine").symlink_to(a_written(folder, "elsewhere"))
    return folder / "mine"


def a_dead_link(folder: Path) -> Path:
    (folder / "mine").symlink_to(folder / "gone")
    return folder / "mine"


def a_file(folder: Path) -> Path:
    (folder / "mine").write_text("results")
    return folder / "mine"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "model"


def a_written(folder: Path, name: str = "mine") -> Path:
    """A folder that this program wrote."""
    with replacing_folder(folder / name, 0) as aside:
        (aside / "config.json").write_text("{}")
        (aside / "release").mkdir()
        (aside / "release" / "weights").write_text("converted")
    return folder / name


def with_one_more(folder: Path) -> Path:
    (a_written(folder) / "notes.md").write_text("what I found")
    return folder / "mine"


def with_one_more_below(folder: Path) -> Path:
    (a_written(folder) / "release" / "notes.md").write_text("what I found")
    return folder / "mine"


def trained_since(folder: Path) -> Path:
    """The model was fine-tuned in place: another program saved it under the same names, with the same sizes."""
    (a_written(folder) / "release" / "weights").write_text("fine-tune")
    os.utime(folder / "mine" / "release" / "weights", ns=(1, 1))
    return folder / "mine"


def with_a_link_in_it(folder: Path) -> Path:
    (a_written(folder) / "data").symlink_to(folder)
    return folder / "mine"


def with_a_borrowed_mark(folder: Path) -> Path:
    shutil.copy(a_written(folder, "other") / MARK, a_model(folder) / MARK)
    return folder / "mine"


def with_a_mark_of_its_own(folder: Path) -> Path:
    (a_model(folder) / MARK).write_text("[]")
    return folder / "mine"


def a_partial_of_somebody(folder: Path) -> Path:
    (folder / ".mine.partial").mkdir()
    (folder / ".mine.partial" / "thesis.txt").write_text("irreplaceable")
    return folder / "mine"


def an_old_of_somebody(folder: Path) -> Path:
    (folder / ".mine.old").mkdir()
    (folder / ".mine.old" / "thesis.txt").write_text("irreplaceable")
    return folder / "mine"


FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a model": (a_model, "holds config.json, which was not written by kdrl_mcore"),
    "a note": (a_note, "holds thesis.txt"),
    "a link": (a_link, "is a symbolic link"),
    "a dead link": (a_dead_link, "is a symbolic link"),
    "a file": (a_file, "is not a folder"),
    "below a file": (below_a_file, "cannot write"),
    "ours and one more file": (with_one_more, "holds notes.md"),
    "ours and one more file below": (with_one_more_below, "holds release/notes.md"),
    "ours, trained since": (trained_since, "holds release/weights, which was not written by kdrl_mcore .or was changed since."),
    "ours with a link": (with_a_link_in_it, "holds data"),
    "a mark from elsewhere": (with_a_borrowed_mark, "holds config.json"),
    "a mark that is none": (with_a_mark_of_its_own, "holds config.json"),
    "somebody's partial": (a_partial_of_somebody, ".mine.partial is in the way"),
    "somebody's old": (an_old_of_somebody, ".mine.old is in the way"),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("command", ["import", "export"])
def test_what_others_wrote_is_never_replaced(
    command: str,
    what: str,
    hf: Path,
    converted: Path,
    tmp_path: Path,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, says = FOREIGN[what]
    target = make(tmp_path)
    before = contents(tmp_path)
    source = ["--hf", str(hf)] if command == "import" else ["--checkpoint", str(converted)]
    code = tool.main([command, *source, "--output", str(target), "--overwrite"])
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 1 and line.startswith("error: ")
    with pytest.raises(ModelError, match=says):
        raise ModelError(line)
    assert contents(tmp_path) == before


def as_it_is(source: Path, folder: Path) -> Path:
    return source


def by_a_link(source: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(source.parent)
    return folder / "link" / source.name


def relative(source: Path, folder: Path) -> Path:
    return Path(os.path.relpath(source))


def roundabout(source: Path, folder: Path) -> Path:
    return source / ".." / source.name


def above(source: Path, folder: Path) -> Path:
    return source.parent


def far_above(source: Path, folder: Path) -> Path:
    return Path("/")


def below(source: Path, folder: Path) -> Path:
    return source / "release" / "hf"


@pytest.mark.parametrize("spelling", [as_it_is, by_a_link, relative, roundabout, above, far_above, below])
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_source_is_never_a_target(
    command: str,
    spelling: Callable[[Path, Path], Path],
    hf: Path,
    converted: Path,
    tmp_path: Path,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Even if this program wrote the source itself."""
    source = hf if command == "import" else converted
    before = contents(hf.parent)
    target = spelling(source, tmp_path)
    options = ["--hf" if command == "import" else "--checkpoint", str(source), "--output", str(target), "--overwrite"]
    assert tool.main([command, *options]) == 1
    assert "a source is never replaced" in capsys.readouterr().err.strip().splitlines()[-1]
    assert contents(hf.parent) == before


def test_its_own_output_is_replaced_only_when_asked(
    hf: Path,
    converted: Path,
    tmp_path: Path,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command, source in (("import", ["--hf", str(hf)]), ("export", ["--checkpoint", str(converted)])):
        arguments = [command, *source, "--output", str(tmp_path / "out")]
        assert tool.main([*arguments, "--overwrite"]) == 0  # an export replaces an import
        before = contents(tmp_path)
        assert tool.main(arguments) == 1
        assert "add --overwrite" in capsys.readouterr().err.strip().splitlines()[-1]
        assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_hf_folder(converted, tmp_path / "empty", quiet)
    assert (tmp_path / "empty" / "config.json").is_file()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["while it is written", "between the renames", "before the first rename"])
def test_an_interrupted_one_leaves_the_old(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = a_written(tmp_path)
    before, replace = contents(target), os.replace
    done: list[Path] = []

    def interrupted(source: Path, destination: Path) -> None:
        if len(done) == (moment == "between the renames"):
            done.append(source)
            raise Killed
        done.append(source)
        replace(source, destination)

    with pytest.raises(Killed), replacing_folder(target, 0, overwrite=True) as aside:
        (aside / "config.json").write_text("new")
        if moment == "while it is written":
            raise Killed
        monkeypatch.setattr(os, "replace", interrupted)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_one_that_was_killed_between_the_renames_is_found_again(tmp_path: Path) -> None:
    """No handler ran: the old folder still has its temporary name, and the next call first restores it."""
    target = a_written(tmp_path)
    before = contents(target)
    target.rename(tmp_path / ".mine.old")
    with pytest.raises(ModelError, match="add --overwrite"), replacing_folder(target, 0):
        pass
    assert contents(target) == before
    (tmp_path / ".mine.partial").mkdir()  # and removes what was begun
    (tmp_path / ".mine.partial" / MARK).write_text("{}")
    with replacing_folder(target, 0, overwrite=True) as aside:
        assert [path.name for path in aside.iterdir()] == [MARK]
        (aside / "config.json").write_text("new")
    assert contents(target)["config.json"] == b"new" and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_comes_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds thesis[.]txt"), replacing_folder(tmp_path / "mine", 0):
        a_note(tmp_path)
    assert contents(tmp_path) == {"mine/thesis.txt": b"irreplaceable"}


def test_the_mark_names_what_was_written(converted: Path) -> None:
    named = json.loads((converted / MARK).read_text())["files"]
    assert set(named) == set(contents(converted)) - {MARK}
    check_target(converted, overwrite=True)


def run_of(zoo: Zoo, run: Path, *more: str) -> list[str]:
    paths = [f"run.dir={run}", f"student.path={zoo.model('untied')}", f"rollout.path={zoo.rollouts('uneven')}"]
    return ["objective=grpo", "rollout=replay", *paths, *QUIET, "trainer.self_test=false", *more]


@pytest.mark.parametrize("foreign", [a_model, a_link, with_one_more], ids=["a model", "a link", "one more file"])
def test_a_run_does_not_replace_what_stands_at_its_export(
    foreign: Callable[[Path], Path], zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    """It is reported before the first step, not after the last."""
    (tmp_path / "run").mkdir()
    foreign(tmp_path).rename(tmp_path / "run" / "hf")
    before = contents(tmp_path)
    outcomes = ranks2.run(train_on_rank, run_of(zoo, tmp_path / "run"))
    assert [outcome.code for outcome in outcomes] == [1, 1]
    (line,) = [line for outcome in outcomes for line in outcome.stderr.splitlines()]
    assert line.startswith("error: ") and f"{tmp_path}/run/hf" in line
    assert contents(tmp_path) == before


def test_a_run_replaces_its_own_export_and_never_its_student(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    for steps in (1, 2):
        (outcome,) = ranks1.run(train_on_rank, run_of(zoo, tmp_path / "run", f"trainer.steps={steps}"))
        assert outcome.code == 0, outcome.stderr
    check_target(tmp_path / "run" / "hf", overwrite=True)
    before = contents(tmp_path / "run" / "hf")
    own = f"student.path={tmp_path}/run/hf"
    (outcome,) = ranks1.run(train_on_rank, run_of(zoo, tmp_path / "run", own))
    assert outcome.code == 2 and "is where this run exports its student" in outcome.stderr
    assert contents(tmp_path / "run" / "hf") == before
