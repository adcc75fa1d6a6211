"""The packages for `make gpu-check` on a bare machine that has only torch and Triton, and no network.

python -m tools.gpu_wheels pack [--python 3.12]   with a network: download the wheels for that Python to build/gpu-wheels
python -m tools.gpu_wheels unpack                 on the machine: install to build/gpu-site, a folder for PYTHONPATH, what it
                                                  lacks or has in other versions than the tests pass with
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-site"
ROOTS = ("kdrl-mcore", "pytest")
LEFT_OUT = {
    *("torch", "triton"),  # already installed
    *("datasets", "matplotlib", "tensorboard"),  # imported only where they are used, and the check does not use them
    *("hf-xet", "typer", "setuptools"),  # not used here
}
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MOST_MIB = 60.0
"""The largest size of the wheels and the files of the repository together."""


def needed() -> dict[str, str]:
    """The packages that the check imports, with the versions installed here."""
    from packaging.requirements import Requirement  # may be missing on a bare machine, which only unpacks

    found: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        if name in found or name in LEFT_OUT:
            continue
        found[name] = importlib.metadata.version(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            extras = [{"extra": extra} for extra in ("", "antlr4_9_3")]  # math-verify needs one of its extras
            if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in extras):
                waiting.append(_canonical(requirement.name))
    return {name: version for name, version in sorted(found.items()) if name != "kdrl-mcore"}


def pack(python: str) -> int:
    """Download the wheels for this version of Python; returns 1 if they are too large."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28)]
    tags = ["--only-binary=:all:", f"--python-version={python}", *platforms, "--platform=manylinux2014_x86_64"]
    for name, version in needed().items():
        pinned = f"{name}=={version}"
        download = [*pip, "download", "--no-deps", *tags, f"--dest={WHEELS}", pinned]
        done = subprocess.run(download, stderr=subprocess.PIPE, check=False)
        if done.returncode:  # published only as source: pure Python, built here
            subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={WHEELS}", pinned], check=True)
    wheels = sum(path.stat().st_size for path in WHEELS.iterdir())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file())
    total = (wheels + tree) / 2**20
    print(f"{len(list(WHEELS.iterdir()))} wheels for Python {python}, {wheels / 2**20:.1f} MiB")
    print(f"with the tree {total:.1f} of at most {MOST_MIB:g} MiB")
    return int(total > MOST_MIB)


def unpack() -> int:
    """Install from the wheels what is not here in the same version; returns 1 if the check cannot run with this Python."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return _fail(f"{sys.executable} has no {name}: name a Python that has it, make gpu-check PYTHON=/path/to/python3")
    installed = importlib.metadata.distributions(path=[str(SITE), *sys.path])
    have = {(_canonical(found.metadata["Name"] or ""), found.version) for found in installed}
    wheels = (path.name.split("-")[:2] for path in sorted(WHEELS.glob("*.whl")))
    missing = [f"{name}=={version}" for name, version in wheels if (_canonical(name), version) not in have]
    if missing:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--upgrade", f"--find-links={WHEELS}", f"--target={SITE}", *missing]
        if subprocess.run(command, check=False).returncode:
            return _fail(f"the wheels in {WHEELS} do not fit Python {PYTHON}: pack them with make gpu-wheels FOR={PYTHON}")
    elif "megatron-core" not in {name for name, _ in have}:
        return _fail(
            f"{sys.executable} lacks what training imports: run make setup or, where there is no network, copy build/gpu-wheels"
            f" from a machine that has one (there: make gpu-wheels FOR={PYTHON})"
        )
    return 0


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


def main() -> int:
    """Run `pack` or `unpack`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("--python", default=PYTHON, help=f"pack for this version (default: {PYTHON}, this one's)")
    options = parser.parse_args()
    return pack(options.python) if options.command == "pack" else unpack()


if __name__ == "__main__":
    sys.exit(main())
