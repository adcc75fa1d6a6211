"""The wheel contains what the package reads, and its commands work without a checkout.

hatchling, which pip gets from the index, builds it: without a network the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kdrl_mcore import __version__

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which only the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, timeout=240
    )
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("hatchling is not available: no network")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    command = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(command, check=True, timeout=240)
    return folder / "site"


def run(site: Path, folder: Path, *words: str) -> str:
    """Run an installed command in a folder; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [str(site / "bin" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_what_the_package_reads_and_a_program_for_each_command(site: Path) -> None:
    package = site / "kdrl_mcore"
    assert (site / f"kdrl_mcore-{__version__}.dist-info").is_dir()
    for name in ("conf", "slurm"):
        shipped = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts}
        assert shipped and all((package / path).exists() for path in shipped)
    data = [
        path.relative_to(ROOT) for path in (ROOT / "kdrl_mcore").rglob("*") if path.suffix in (".html", ".css", ".js", ".json")
    ]
    assert len(data) >= 16 and all((site / path).is_file() for path in [*data, Path("kdrl_mcore/py.typed")])
    assert all(os.access(site / "bin" / name, os.X_OK) for name in SCRIPTS)
    assert not {path.name for path in site.iterdir()} & {"tests", "tools", "benchmarks", "examples", "conf"}


def test_commands_work_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    """A plan reads the groups of `conf` and the shapes of published models, and --help reads the schema."""
    assert "s per iteration" in run(site, tmp_path, "kdrl-plan", "experiment=kdrl_32b", "cluster=h100")
    assert run(site, tmp_path, "kdrl-train", "--help").startswith("usage: kdrl-train ")
    run(site, tmp_path, "kdrl-slurm", "jobs")
    assert os.access(tmp_path / "jobs" / "kdrl_32b.sh", os.X_OK)
