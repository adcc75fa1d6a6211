"""The report in a real browser: what it draws, what it says to a reader, that its script has no errors, and that it follows a
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdrl_mcore.cli.report import watch
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.studies.report.page import write_page
from kdrl_mcore.studies.report.runs import by_configuration, read_runs
from tests.support.reported_runs import rollout, write_run

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1300,900"),
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed: apt-get install chromium")


class Browser:
    """A running browser, driven through the pipe of its DevTools protocol: JSON messages that end in a zero byte."""

    def __init__(self, commands: io.FileIO, answers: io.FileIO) -> None:
        self._commands, self._answers, self._ids, self._received = commands, answers, itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command; other messages from the browser are kept in `events`."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                self._received += os.read(self._answers.fileno(), 1 << 20) or pytest.fail("the browser ended")
            one, _, self._received = self._received.partition(b"\0")
            if (answer := json.loads(one)).get("id") == number:
                return answer.get("result", {})
            self.events.append(answer)

    def open(self, file: Path) -> Tab:
        """The page in a new tab, after its script has run."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab = Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for method, params in {"Runtime.enable": {}, "Log.enable": {}, "Page.navigate": {"url": file.as_uri()}}.items():
            self.call(method, tab.session, **params)
        tab.wait_until("document.readyState === 'complete' && document.querySelector('#main')?.childElementCount > 0")
        return tab


@dataclass(frozen=True)
class Tab:
    """An open page."""

    browser: Browser
    session: str

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; None if it fails, for example while the page is being reloaded."""
        found = self.browser.call("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        return found.get("result", {}).get("value")

    def wait_until(self, expression: str) -> None:
        deadline = time.monotonic() + 100
        while self.evaluate(expression) is not True:
            assert time.monotonic() < deadline, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.05)

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """The page's console messages and the errors of its script."""
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.browser.events if event.get("sessionId") == self.session and event["method"] in said]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests; it listens on file descriptor 3 and answers on 4."""
    assert BROWSER is not None
    (their_commands, commands), (answers, their_answers) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_commands, their_answers)]  # out of the way of 3 and 4
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--remote-debugging-pipe"]
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
            yield Browser(writer, reader)
    finally:
        process.terminate()
        process.wait()


def open_page(page: str, folder: Path, browser: Browser) -> Tab:
    (folder / "report.html").write_text(page)
    return browser.open(folder / "report.html")


@pytest.mark.timeout(300)
def test_everything_is_drawn_without_a_fault(tmp_path: Path, browser: Browser) -> None:
    base = ("experiment=tiny_cpu", "objective=kdrl")
    directories = [
        write_run(tmp_path / f"kdrl_seed{seed}", *base, f"trainer.seed={seed}", accuracy=0.5 + seed / 50) for seed in (1, 2, 3)
    ]
    directories.append(
        write_run(tmp_path / "grpo", "experiment=tiny_cpu", "objective=grpo", teacher=False).rename(tmp_path / "<i>grpo")
    )
    write_rollouts(directories[0] / "rollouts" / "step_000003.jsonl", [rollout(1.0), rollout(0.0), rollout(0.0)])

    tab = open_page(write_page(by_configuration(read_runs(directories))), tmp_path, browser)
    document = tab.evaluate("document.documentElement.outerHTML")

    assert tab.complaints == []
    assert re.search(r'<div id="error" role="alert"></div>', document)  # its error handler had nothing to show
    assert "2 configurations, 4 runs (4 finished)" in document and "&lt;i&gt;grpo" in document
    body = document.split("<script>")[0]
    (table,) = re.findall(r'<table id="table">.*?</table>', body, re.DOTALL)
    assert table.count("<tr") == 3 and "54.0%<small> ± 5.0%</small>" in table
    assert "Curves and rollouts need JavaScript" in body and "54.0% ± 5.0%" in body  # these are there without JavaScript
    panels = re.findall(r"<figure>.*?</figure>", body, re.DOTALL)
    titles = [re.sub("<[^>]*>", "", re.findall(r"<figcaption.*?</figcaption>", panel)[0]) for panel in panels]
    assert titles[:4] == ["Accuracy, held out", "Greedy accuracy, held out", "Reward", "Accuracy"]
    lines = {title: set(re.findall(r'data-group="(\d)"', panel)) for title, panel in zip(titles, panels, strict=True)}
    assert lines["Reward"] == {"0", "1"} and lines["KL to the teacher · nats/token"] == {"0"}
    assert all(re.search(r'class="curve" d="M[\d.]+ [\d.]+', panel) for panel in panels) and "NaN" not in body
    assert panels[0].count('class="mark"') == 4  # held-out accuracy at the start and the end, for both runs
    same = next(panel for title, panel in zip(titles, panels, strict=True) if title.startswith("Response length"))
    assert (
        "kdrl, &lt;i&gt;grpo coincide" in same and len(re.findall(r'stroke-dasharray="9 9"', same)) == 1
    )  # neither line hides the other
    assert len(re.findall(r'<span style="background[^"]*" data-i="\d">', body)) == 9  # three responses, three tokens each
    assert "objective.beta.init" in body and '<span id="live" class="live" hidden="">' in body


@pytest.mark.timeout(300)
def test_a_live_page_says_so_and_a_run_without_anything_draws_nothing(tmp_path: Path, browser: Browser) -> None:
    run = write_run(tmp_path / "run", "experiment=tiny_cpu", steps=1, planned=4)
    page = write_page(by_configuration(read_runs([run])), reload_seconds=60)
    tab = open_page(page, tmp_path, browser)
    document = tab.evaluate("document.documentElement.outerHTML")
    assert tab.complaints == [] and "1 configuration, 1 run (0 finished)" in document and "● live" in document
    assert "NaN" not in document.split("<script>")[0] and "<h2>Rollouts" not in document.split("<script>")[0]


def test_a_reader_hides_sorts_and_turns_the_panels(tmp_path: Path, browser: Browser) -> None:
    base, names = ("experiment=tiny_cpu", "objective=kdrl"), ("weak", "usual", "strong")
    runs = [write_run(tmp_path / n, *base, f"teacher.path={n}", accuracy=0.5 + i / 10) for i, n in enumerate(names)]
    write_rollouts(runs[0] / "rollouts" / "step_000003.jsonl", [rollout(1.0), rollout(0.0)])
    tab = open_page(write_page(by_configuration(read_runs(runs))), tmp_path, browser)

    def click(words: str) -> None:
        tab.evaluate(f"[...document.querySelectorAll('button')].find(b => b.textContent.startsWith('{words}')).click()")

    def texts(selector: str) -> list[str]:
        return tab.evaluate(f"[...document.querySelectorAll('{selector}')].map(node => node.textContent)")

    click("accuracy")
    assert texts("#table tbody td:first-child") == ["strong", "usual", "weak"]
    click("accuracy")
    assert texts("#table tbody td:first-child") == ["weak", "usual", "strong"]
    click("a configuration each")
    assert texts("#panels figcaption") == ["weak", "usual", "strong"]
    assert len(set(texts("#panels svg > text:first-of-type"))) == 1  # all panels have one axis
    assert set(texts("#panels svg .tick")) <= {str(step) for step in range(11)}  # ticks are whole steps
    faint = tab.evaluate("[...document.querySelectorAll('#panels svg')].map(s => s.querySelectorAll(':scope > path').length)")
    assert faint == [3, 3, 3]  # the other runs, for comparison
    click("tokens")
    assert set(texts("#panels svg .axis")) == {"tokens trained on"} and "10000" in texts("#panels svg .tick")
    click("time")
    assert set(texts("#panels svg .axis")) == {"time in steps and evaluations (seconds)"} and "8" in texts("#panels svg .tick")
    paths = "[...document.querySelectorAll('#panels .curve')].map(line => line.getAttribute('d'))"
    linear = tab.evaluate(paths)
    click("logarithmic")
    assert not set(tab.evaluate(paths)) & set(linear) and len(texts("#panels .remark")) == 0  # positive values: no caveat
    for button in ("linear", "steps"):
        click(button)
    click("usual")
    assert texts("#panels figcaption") == texts("#table tbody td:first-child") == ["weak", "strong"]
    colours = []
    for kind in ("advantage", "log-ratio", "surprise"):
        click(kind)
        colours.append(tab.evaluate("[...document.querySelectorAll('.tokens span')].map(token => token.style.background)"))
    assert len({str(each) for each in colours}) == 3 and len(set(colours[0])) == 2 and len(set(colours[1])) > 2
    assert tab.complaints == []


@pytest.mark.timeout(300)
def test_an_open_page_follows_a_live_run_to_its_end(tmp_path: Path, browser: Browser) -> None:
    run, output = write_run(tmp_path / "run", "experiment=tiny_cpu", steps=2, planned=4), tmp_path / "report.html"
    watcher = threading.Thread(target=watch, args=([run], output, 0.3, Console(file=io.StringIO())), daemon=True)
    watcher.start()
    while not output.is_file():
        watcher.join(0.05)
    tab = browser.open(output)
    tab.wait_until("document.querySelector('#live')?.hidden === false && DATA.groups[0].runs[0].step === 2")
    tab.wait_until("document.querySelector('#theme').click(), document.documentElement.dataset.theme === 'light'")
    with MetricsLog(run) as log:
        log.write(3, {"reward": 0.9})
    # Only the page itself reloads it, and the reader's choices stay.
    tab.wait_until("document.querySelector('#table')?.innerText.includes('0.400')")
    tab.wait_until("document.documentElement.dataset.theme === 'light'")
    with MetricsLog(run) as log:
        log.write(4, {"reward": 0.9})
    tab.wait_until("document.querySelector('#stamp')?.innerText.includes('1 run (1 finished)')")
    watcher.join(60)
    assert not watcher.is_alive() and tab.evaluate("document.querySelector('#live').hidden") is True
    assert tab.complaints == []
