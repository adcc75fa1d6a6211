"""The report opened in a real browser: what it draws, what it says to a reader, that it has no fault, and that it follows a
live run."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.reporting.page import write_page
from kdrl_mcore.reporting.runs import by_configuration, read_runs
from kdrl_mcore.rollout.files import write_rollouts
from tests.unit.test_report import rollout, write_run
from tools.report import watch

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


class Tab:
    """An open page of a running browser, over the pipe of its DevTools protocol: JSON messages that end in a zero byte."""

    def __init__(self, commands: io.FileIO, answers: io.FileIO, url: str) -> None:
        self._commands, self._answers, self._ids, self._received = commands, answers, itertools.count(1), b""
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; None where the page is just being loaded anew."""
        found = self._call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        return found.get("result", {}).get("value")

    def wait_until(self, expression: str) -> None:
        deadline = time.monotonic() + 100
        while self.evaluate(expression) is not True:
            assert time.monotonic() < deadline, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.05)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                self._received += os.read(self._answers.fileno(), 1 << 20) or pytest.fail("the browser ended")
            one, _, self._received = self._received.partition(b"\0")
            if (answer := json.loads(one)).get("id") == number:
                return answer.get("result", {})


@contextmanager
def open_tab(url: str, folder: Path) -> Iterator[Tab]:
    """The page in a browser that stays open; the browser talks on file descriptors 3 and 4."""
    assert BROWSER is not None
    (their_commands, commands), (answers, their_answers) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_commands, their_answers)]  # out of the way of 3 and 4
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", *command],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (their_commands, their_answers, *theirs):
        os.close(end)
    try:
        with open(commands, "wb", 0) as writer, open(answers, "rb", 0) as reader:
            yield Tab(writer, reader, url)
    finally:
        process.terminate()
        process.wait()


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


@pytest.mark.timeout(300)
def test_an_open_page_follows_a_live_run_to_its_end(tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run", "experiment=tiny_cpu", steps=2, planned=4), tmp_path / "report.html"
    watcher = threading.Thread(target=watch, args=([run], output, 0.3, Console(file=io.StringIO())), daemon=True)
    watcher.start()
    while not output.is_file():
        watcher.join(0.05)
    with open_tab(output.as_uri(), tmp_path) as tab:
        tab.wait_until("document.querySelector('#live')?.hidden === false && DATA.groups[0].runs[0].step === 2")
        tab.wait_until("document.querySelector('#theme').click(), document.documentElement.dataset.theme === 'light'")
        with MetricsLog(run, tensorboard=False) as log:
            log.write(3, {"reward": 0.9})
        # Nobody but the page itself loads it anew, and what the reader chose stays.
        tab.wait_until("document.querySelector('#table')?.innerText.includes('0.400')")
        tab.wait_until("document.documentElement.dataset.theme === 'light'")
        with MetricsLog(run, tensorboard=False) as log:
            log.write(4, {"reward": 0.9})
        tab.wait_until("document.querySelector('#stamp')?.innerText.includes('1 run (1 finished)')")
        watcher.join(60)
        assert not watcher.is_alive() and tab.evaluate("document.querySelector('#live').hidden") is True
        assert tab.evaluate("document.querySelector('#error').innerText") == ""
