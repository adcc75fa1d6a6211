"""The packages for `make gpu-check` on a bare machine that has only torch, Triton and numpy, and no network.

python -m tools.gpu_wheels pack     with a network: download the wheels to build/gpu-wheels
python -m tools.gpu_wheels unpack   on the machine: install those that are missing to build/gpu-site, which goes on PYTHONPATH
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-site"
ROOTS = ("kdrl-mcore", "pytest")
LEFT_OUT = {
    *("torch", "triton", "numpy"),  # already installed
    *("datasets", "matplotlib", "tensorboard"),  # imported only where they are used, and the check does not use them
    *("hf-xet", "typer", "setuptools"),  # not used here
}
PYTHONS = ("3.11", "3.12")
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
                waiting.append(re.sub(r"[-_.]+", "-", requirement.name).lower())
    return {name: version for name, version in sorted(found.items()) if name != "kdrl-mcore"}


def pack() -> int:
    """Download the wheels for every Python of `PYTHONS`; returns 1 if they are too large."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for name, version in needed().items():
        pinned = f"{name}=={version}"
        for python in PYTHONS:
            platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28)]
            tags = ["--only-binary=:all:", f"--python-version={python}", *platforms, "--platform=manylinux2014_x86_64"]
            done = subprocess.run([*pip, "download", "--no-deps", *tags, f"--dest={WHEELS}", pinned], check=False)
            if done.returncode:  # published only as source: pure Python, built here
                subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={WHEELS}", pinned], check=True)
                break
    wheels = sum(path.stat().st_size for path in WHEELS.iterdir())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file())
    total = (wheels + tree) / 2**20
    print(
        f"{len(list(WHEELS.iterdir()))} wheels, {wheels / 2**20:.1f} MiB, with the tree {total:.1f} of at most {MOST_MIB:g} MiB"
    )
    return int(total > MOST_MIB)


def unpack() -> int:
    """Install the missing packages from the wheels for this Python."""
    have = {re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
    missing = [
        path for path in sorted(WHEELS.glob("*.whl")) if re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower() not in have
    ]
    names = sorted({"==".join(path.name.split("-")[:2]) for path in missing})
    if not names:
        return 0
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    return subprocess.run([*command, f"--find-links={WHEELS}", f"--target={SITE}", *names], check=False).returncode


def main() -> int:
    """Run `pack` or `unpack`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "unpack"))
    return pack() if parser.parse_args().command == "pack" else unpack()


if __name__ == "__main__":
    sys.exit(main())
