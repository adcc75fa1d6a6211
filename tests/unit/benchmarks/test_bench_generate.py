"""`bench generate`: engines generate what was requested, and the table has their times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.generate import Generation, Measured, table
from tests.reference.tiny_models import make_qwen2

WORK = Generation("m", 100, "float32", [4], 3, 11, 3, 1, True)


def test_a_step_is_what_the_tokens_after_the_first_take() -> None:
    products = Measured("products", 4, [0.9, 1.1, 9.0], [0.1, 0.1, 0.1], [0.5] * 3, [0.1] * 3)
    ours = Measured("this engine", 4, [2.0, 2.2, 2.4], [0.2, 0.3, 0.1], [1.0] * 3, [0.2] * 3)
    assert (products.step(11), ours.step(11)) == (pytest.approx(0.1), pytest.approx(0.2))
    rows = zip(*(column.cells for column in table("m", WORK, [ours, products]).columns), strict=True)
    assert list(rows) == [
        ("4", "this engine", "20", "2.20 s", "2.00", "0.20 s", "200.0 ms", "2.00", "1.00 s", "2.00"),
        ("4", "products", "40", "1.10 s", "1.00", "0.10 s", "100.0 ms", "1.00", "0.50 s", "1.00"),
    ]


def test_engines_generate_what_they_are_asked_for(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "model", seed=1, vocab_size=300)
    options = ["--models", str(model), "--dtypes", "float32", "--sequences", "3", "--prompt-tokens", "5", "--tokens", "4"]
    peers = ["--engines", "products", "this engine", "--repeats", "2", "--threads", "1"]
    assert bench.main(["generate", *options, *peers, "--json", str(tmp_path / "out.json")]) == 0
    (one,) = json.loads((tmp_path / "out.json").read_text())
    assert one["work"]["vocab"] == 300
    assert [each["engine"] for each in one["measured"]] == ["products", "this engine"]
    for each in one["measured"]:
        assert each["sequences"] == 3 and len(each["all"]) == len(each["first_cpu"]) == 2


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["generate", "--models", str(tmp_path)]) == 2
    assert f"--models: {tmp_path} is not an HF folder" in capsys.readouterr().err
