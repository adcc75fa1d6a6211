"""`kdrl-slurm DIR`: the scripts work from any folder with the Python that wrote them, and a user's changes are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdrl_mcore.cli.slurm import INTERPRETER, main

SRUN = """#!/usr/bin/env bash
echo "$PYTHONPATH|$KDRL_ROOT|$KDRL_PYTHON|$*" >>"$CALLS"
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A folder that the command wrote; its name has a blank."""
    folder = tmp_path / "my jobs"
    assert main([str(folder)]) == 0
    return folder


def test_a_job_finds_the_folder_and_runs_with_the_python_that_wrote_it(scripts: Path, tmp_path: Path) -> None:
    bin_folder, spool, work = tmp_path / "bin", tmp_path / "spool", tmp_path / "work"
    for folder in (bin_folder, spool, work):
        folder.mkdir()
    (work / "kdrl_mcore").mkdir()  # a folder that only looks like a checkout
    record = f"JobId=7 Restarts=0\n   Command={scripts}/kdrl_32b.sh experiment=tiny_cpu data=/other/a.sh\n"
    (bin_folder / "srun").write_text(SRUN)
    (bin_folder / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{record}END\n")
    for program in bin_folder.iterdir():
        program.chmod(0o755)
    shutil.copy(scripts / "kdrl_32b.sh", spool / "slurm_script")  # as SLURM does
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "KDRL_"))}
    environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "PYTHONPATH": "/mine"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    command = ["bash", str(spool / "slurm_script"), "experiment=tiny_cpu", "run.dir=run"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    preflight, train = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    for python_path, root, python, call in (preflight, train):
        assert (python_path, root, python) == (f"{work}:/mine", str(scripts), sys.executable)
        assert f" bash {scripts}/task.sh kdrl_mcore." in call and " experiment=tiny_cpu run.dir=run " in call
    assert (work / "run" / "logs" / "7-0").is_dir()


def test_every_script_is_there_and_those_to_submit_are_programs(scripts: Path) -> None:
    names = {path.name for path in scripts.iterdir()}
    assert names > {"kdrl_32b.sh", "kdrl_70b.sh", "experiments.sh", "launch.sh", "task.sh", "settings.py"}
    assert all(os.access(scripts / name, os.X_OK) for name in ("kdrl_32b.sh", "kdrl_70b.sh", "task.sh"))
    assert (scripts / INTERPRETER).read_text() == f"{sys.executable}\n"


def test_what_a_user_changed_is_kept(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, launch = scripts / "kdrl_32b.sh", scripts / "launch.sh"
    original = script.read_text()
    script.write_text(original.replace("--mem=0", "--mem=100G"))
    launch.write_text("# of an older version\n")
    capsys.readouterr()
    assert main([str(scripts)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {scripts} holds kdrl_32b.sh, launch.sh, changed since kdrl-slurm wrote ")
    assert errors.count("\n") == 1 and "--mem=100G" in script.read_text() and "older" in launch.read_text()
    assert main([str(scripts), "--overwrite"]) == 0
    assert script.read_text() == original


def test_a_folder_of_an_older_version_is_brought_up_to_date(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scripts / "mine.sh").write_text("# my own\n")
    monkeypatch.setattr(sys, "executable", "/opt/other/bin/python")
    assert main([str(scripts)]) == 0
    assert (scripts / INTERPRETER).read_text() == "/opt/other/bin/python\n" and (scripts / "mine.sh").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"
