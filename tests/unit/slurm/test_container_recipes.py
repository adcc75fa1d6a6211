"""The recipes of slurm/container, without building a container: what they copy exists and suffices, and the Python of an
Apptainer image is called with its mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

RECIPES = ROOT / "slurm" / "container"


def copies(recipe: str) -> dict[str, str]:
    """What each recipe copies: source by target, both relative to the repository."""
    lines = [line.split() for line in (RECIPES / recipe).read_text().splitlines()]
    if recipe == "Dockerfile":
        pairs = [(source, words[-1]) for words in lines if words[:1] == ["COPY"] for source in words[1:-1]]
        pairs = [(source, target + Path(source).name if target.endswith("/") else target) for source, target in pairs]
    else:
        pairs = [(words[0], words[1]) for words in lines if words[1:] and words[0] != "bash" and words[1].startswith("/opt/")]
    return {target.removeprefix("/opt/source/"): source for source, target in pairs if not source.startswith("/")}


@pytest.mark.parametrize("recipe", ["Dockerfile", "apptainer.def"])
def test_an_image_is_made_of_what_install_needs(recipe: str) -> None:
    copied = copies(recipe)
    packaged = {"pyproject.toml", "README.md", "LICENSE", "kdrl_mcore", "conf"}
    assert copied.keys() == packaged | {"constraints.txt", "constraints-gpu.txt", "slurm/container/install.sh"}
    assert all(target == source and (ROOT / source).exists() for target, source in copied.items())
    text = (RECIPES / recipe).read_text()
    assert "bash /opt/source/slurm/container/install.sh" in text and "/opt/kdrl/bin:$PATH" in text


def test_both_recipes_begin_with_the_same_image() -> None:
    docker, apptainer = ((RECIPES / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    (base,) = [line.split()[1] for line in docker.splitlines() if line.startswith("FROM ")]
    assert f"From: {base}\n" in apptainer


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_python_of_an_apptainer_image(tmp_path: Path) -> None:
    (tmp_path / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "KDRL_MOUNTS": "/data:/data",
        "KDRL_IMAGE": "/i.sif",
    }
    command = [str(RECIPES / "apptainer-python"), "-m", "kdrl_mcore.train", "run.dir=a b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    options = ["exec", "--nv", "--bind", f"{tmp_path},/data:/data", "--pwd", str(tmp_path)]
    assert done.stdout.splitlines() == [*options, "/i.sif", "/opt/kdrl/bin/python", *command[1:]]
    elsewhere = subprocess.run(command, cwd=tmp_path, env=environment | {"KDRL_ROOT": "/r"}, capture_output=True, text=True)
    assert elsewhere.stdout.splitlines()[3] == f"{tmp_path},/r,/data:/data"
    environment.pop("KDRL_IMAGE")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "KDRL_IMAGE: set it to the image, a .sif file" in done.stderr
