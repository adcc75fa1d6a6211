"""The pinned versions are within the bounds of pyproject.toml and resolve together on the package index, without local wheels,
for every Python that the README names. Without a network the second part is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCE_ONLY = "antlr4-python3-runtime"
"""The package that has no wheel on the index."""


def pins(name: str) -> dict[str, str]:
    """Version by package."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-")
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize(
    ("file", "requirements"),
    [
        (
            "constraints.txt",
            [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["loggers"], *EXTRAS["docs"], *EXTRAS["smollm2"]],
        ),
        ("constraints-gpu.txt", [*EXTRAS["gpu"], *EXTRAS["vllm"]]),
    ],
)
def test_pins_are_within_the_bounds_of_the_package(file: str, requirements: list[str]) -> None:
    pinned = pins(file)
    bounds = {canonicalize_name(requirement.name): requirement.specifier for requirement in map(Requirement, requirements)}
    assert bounds.pop("triton", None) is None or "triton" not in pinned  # torch's own requirement chooses it
    assert bounds.keys() <= pinned.keys()
    assert {name: pinned[name] for name in bounds if pinned[name] not in bounds[name]} == {}


def test_both_files_give_a_package_one_version() -> None:
    gpu = (ROOT / "constraints-gpu.txt").read_text().splitlines()
    assert "-c constraints.txt" in gpu and not pins("constraints.txt").keys() & pins("constraints-gpu.txt").keys()


def pip(*arguments: str | Path, seconds: float = 500) -> subprocess.CompletedProcess[str]:
    """pip without this machine's settings, except for the address of the index."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    found = subprocess.run([*command, "config", "get", "global.index-url"], capture_output=True, text=True, check=False)
    if found.returncode == 0:
        environment.setdefault("PIP_INDEX_URL", found.stdout.strip())
    environment["PIP_CONFIG_FILE"] = os.devnull
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of the package that the index has only as source: pip resolves for another Python by wheels
    only."""
    folder = tmp_path_factory.mktemp("wheels")
    version = pins("constraints.txt")[SOURCE_ONLY]
    done = pip("wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", folder, f"{SOURCE_ONLY}=={version}")
    if done.returncode != 0:
        pytest.skip(f"the package index does not answer: {done.stderr.strip().splitlines()[-1]}")
    return folder


def interpreter(version: str) -> str | None:
    """A working Python of this version, if there is one."""
    path = shutil.which(f"python{version}")
    works = path is not None and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    return path if works else None


RUN, DEVELOP = PROJECT["dependencies"], [*EXTRAS["dev"], *EXTRAS["loggers"], *EXTRAS["docs"]]
RESOLUTIONS: dict[str, tuple[str, str, list[str]]] = {
    "3.11": ("3.11", "constraints.txt", [*RUN, *DEVELOP]),
    "3.12": ("3.12", "constraints.txt", [*RUN, *DEVELOP]),
    "3.13": ("3.13", "constraints.txt", [*RUN, *DEVELOP]),
    # Some requirements of reasoning-gym have no wheels, so it resolves only for an installed Python.
    "examples": (f"{sys.version_info.major}.{sys.version_info.minor}", "constraints.txt", [*RUN, *EXTRAS["smollm2"]]),
    # Without Transformer Engine's part for torch, which is built from source against an installed torch.
    "3.12 with GPUs": ("3.12", "constraints-gpu.txt", [*RUN, *EXTRAS["vllm"], "transformer-engine[core_cu13]"]),
}
"""The version of Python, the constraints, and the requirements."""


def resolve(version: str, file: str, requirements: list[str], index: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """What pip would install."""
    python = interpreter(version)
    if python is not None:
        where = ["--python", python, "install"]
    else:
        where = ["install", "--python-version", version, "--only-binary=:all:", "--find-links", index, "--target", target]
    asked = ["--dry-run", "--ignore-installed", "--no-cache-dir", "--use-feature=fast-deps", "--constraint", ROOT / file]
    return pip(*where, *asked, *requirements)


@pytest.fixture(scope="module")
def resolutions(
    index: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All resolutions run at once: pip mostly waits for the index."""
    with ThreadPoolExecutor(len(RESOLUTIONS)) as pool:
        yield {
            name: pool.submit(resolve, *asked, index, tmp_path_factory.mktemp("target")) for name, asked in RESOLUTIONS.items()
        }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RESOLUTIONS)
def test_pins_resolve_on_the_index(name: str, resolutions: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = resolutions[name].result()
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr}"
    assert f"torch-{pins('constraints.txt')['torch']}" in done.stdout
