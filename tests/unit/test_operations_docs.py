"""The commands and settings that the operations pages mention exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.config.help import documented_keys
from kdrl_mcore.monitoring.alerts import SIGNATURES
from kdrl_mcore.monitoring.metrics import METRICS
from tests.support import ROOT

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("operations", "slurm", "troubleshooting", "rollout")}
KEYS = {key.name for key in documented_keys()}


def code(text: str) -> str:
    """The text in code blocks and between backquotes."""
    return "\n".join(part.strip("`") for part in re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


@pytest.mark.parametrize("page", PAGES)
def test_every_key_exists(page: str) -> None:
    groups = {key.split(".")[0] for key in KEYS}
    named = re.findall(r"(?<![\w./-])([a-z]\w*(?:\.[a-z]\w*)+)(?=[=\s,);]|$)", code(PAGES[page]))
    keys = [name for name in named if name.split(".")[0] in groups]
    assert len(keys) >= 3
    assert [key for key in keys if key not in KEYS and not any(known.startswith(f"{key}.") for known in KEYS)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_script_and_setting_exists(page: str) -> None:
    files = re.findall(r"\b(?:tools|slurm|tests|docs)/\w+(?:\.\w+)?", code(PAGES[page]))
    assert [name for name in files if not (ROOT / name).exists()] == []
    readers = (*ROOT.glob("slurm/*.sh"), ROOT / "slurm/container/apptainer-python", *ROOT.glob("kdrl_mcore/rollout/**/*.py"))
    read = "".join(path.read_text() for path in readers)
    assert [name for name in re.findall(r"\bKDRL_[A-Z_]+", PAGES[page]) if name not in read] == []


COMMANDS = [line for text in PAGES.values() for line in code(text).splitlines() if re.match(r"sbatch .*slurm/kdrl_", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_job_that_is_submitted_has_a_configuration(command: str) -> None:
    """Also what the script adds if no experiment is named."""
    words = shlex.split(command.replace("...", "").replace("%a", "1"), comments=True)
    (script,) = [word for word in words if "slurm/kdrl_" in word]
    given = words[words.index(script) + 1 :]
    config = load_config([f"experiment={Path(script).stem}", *given])
    assert config.student.path and config.run.dir


def test_the_page_on_operations_tells_of_every_alert() -> None:
    for signature in SIGNATURES:
        assert f"| `{signature.__name__}` |" in PAGES["operations"]


def test_the_metrics_to_watch_are_written() -> None:
    watched = re.search(r"In the first ten steps look at (.*?)\n\n", PAGES["operations"], re.DOTALL)
    assert watched is not None
    names = re.findall(r"`([\w/]+)\*?`", watched.group(1))
    assert len(names) >= 4
    assert [name for name in names if not any(metric.startswith(name) for metric in METRICS)] == []


def test_every_message_to_look_up_is_one_that_is_written() -> None:
    """The parts of a message between the values that change from run to run."""
    files = [*ROOT.glob("kdrl_mcore/**/*.py"), *ROOT.glob("slurm/*.*")]
    sources = "".join(path.read_text() for path in files)
    written = re.sub(r'"\s*\n\s*f?"', "", sources)  # a message that spans several lines of code
    messages = re.findall(r"^\| `(?:preflight, [\w.-]+: )?(.*?)` \|", PAGES["troubleshooting"], re.MULTILINE)
    assert len(messages) >= 10
    for message in messages:
        parts = re.split(r"\.\.\.|manifest\.json|\b[A-Z]+\b|\d+|[(:]", message)
        assert [part.strip() for part in parts if len(part.strip()) > 5 and part.strip() not in written] == [], message
