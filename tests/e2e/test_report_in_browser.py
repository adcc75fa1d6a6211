"""The report opened in a real browser: what it draws, what it says to a reader, and that it has no fault."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kdrl_mcore.reporting.page import write_page
from kdrl_mcore.reporting.runs import by_configuration, read_runs
from kdrl_mcore.rollout.files import write_rollouts
from tests.unit.test_report import rollout, write_run

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1300,900"),
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")


def open_page(page: str, folder: Path) -> tuple[str, str]:
    """The document as the browser has it after its script, and what the script said on the console."""
    assert BROWSER is not None
    (folder / "report.html").write_text(page)
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.timeout(300)
def test_everything_is_drawn_without_a_fault(tmp_path: Path) -> None:
    base = ("experiment=tiny_cpu", "objective=kdrl")
    directories = [
        write_run(tmp_path / f"kdrl_seed{seed}", *base, f"trainer.seed={seed}", accuracy=0.5 + seed / 50) for seed in (1, 2, 3)
    ]
    directories.append(
        write_run(tmp_path / "grpo", "experiment=tiny_cpu", "objective=grpo", teacher=False).rename(tmp_path / "<i>grpo")
    )
    write_rollouts(directories[0] / "rollouts" / "step_000003.jsonl", [rollout(1.0), rollout(0.0), rollout(0.0)])

    document, console = open_page(write_page(by_configuration(read_runs(directories))), tmp_path)

    assert console == ""
    assert re.search(r'<div id="error" role="alert"></div>', document)  # its fault handler had nothing to show
    assert "2 configurations, 4 runs (4 finished)" in document and "&lt;i&gt;grpo" in document
    body = document.split("<script>")[0]
    (table,) = re.findall(r'<table id="table">.*?</table>', body, re.DOTALL)
    assert table.count("<tr") == 3 and "54.0%<small> ± 5.0%</small>" in table
    panels = re.findall(r"<figure>.*?</figure>", body, re.DOTALL)
    titles = [re.sub("<[^>]*>", "", re.findall(r"<figcaption.*?</figcaption>", panel)[0]) for panel in panels]
    assert titles[:4] == [
        "Accuracy (dots: held out)",
        "Reward",
        "KL to the teacher · nats/token",
        "Coefficient of distillation, beta",
    ]
    lines = {title: set(re.findall(r'data-group="(\d)"', panel)) for title, panel in zip(titles, panels, strict=True)}
    assert lines["Reward"] == {"0", "1"} and lines["KL to the teacher · nats/token"] == {"0"}
    assert all(re.search(r'<path d="M[\d.]+ [\d.]+', panel) for panel in panels) and "NaN" not in body
    assert panels[0].count("<circle") == 4  # held out at the start and the end, for both
    assert len(re.findall(r'<span style="background[^"]*" data-i="\d">', body)) == 9  # three responses, three tokens each
    assert "objective.beta.init" in body and '<span id="live" class="live" hidden="">' in body


@pytest.mark.timeout(300)
def test_a_live_page_says_so_and_a_run_without_anything_draws_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "experiment=tiny_cpu", steps=1, planned=4)
    page = write_page(by_configuration(read_runs([run])), reload_seconds=60)
    document, console = open_page(page, tmp_path)
    assert console == "" and "1 configuration, 1 run (0 finished)" in document and "● live" in document
    assert "NaN" not in document.split("<script>")[0] and "<h2>Rollouts" not in document.split("<script>")[0]
