"""The reward `python_code`: what passes, and that a program cannot cheat, harm the machine or outlive its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.reward import python_code, sandbox
from kdrl_mcore.reward.python_code import PythonCode, program_of
from kdrl_mcore.types import Rollout

Tests = list[dict[str, str]]
ADD: Tests = [{"call": "add(2, 3)", "output": "5"}, {"call": "add('a', 'b')", "output": "'ab'"}]
SUM: Tests = [{"stdin": "2 3\n", "output": "5\n"}, {"stdin": "-1 1", "output": "0"}]
ADDS = "def add(a, b): return a + b"
HAS_NAMESPACES = (
    subprocess.run([sys.executable, "-I", "-S", sandbox.__file__, "--probe"], capture_output=True, text=True).stdout.strip()
    == "namespace"
)


def score(code: PythonCode, *programs: tuple[str, Tests | str]) -> list[float]:
    ids = np.zeros(1, np.int64)
    return code.score(
        [
            Rollout("p", 0, ids, ids, np.zeros(1, np.float32), "stop", 0, response=program, answer=json.dumps(tests))
            for program, tests in programs
        ]
    )


def test_the_program_is_the_last_fenced_block_or_the_whole_response() -> None:
    assert program_of("first\n```python\na = 1\n```\nthen\n```py\nb = 2\n```\n") == "b = 2\n"
    assert program_of("a = 1") == "a = 1"


def test_right_and_wrong_programs() -> None:
    code = PythonCode(RewardConfig(timeout=60))
    programs = {
        f"```python\n{ADDS}\n```": ADD,
        f"print('noise')\n{ADDS}": ADD,
        "import math, functools, collections\n" + ADDS: ADD,
        "def add(a, b): return a - b": ADD,
        "def add(a, b): return 5": ADD,
        "this is no program": ADD,
        "": ADD,
        "print(sum(map(int, input().split())))": SUM,
        "import sys\nprint(sum(map(int, sys.stdin.read().split())), '  ')": SUM,
        "print(5)": SUM,
        "print(sum(map(int, input().split())))\nraise SystemExit(1)": SUM,
    }
    assert score(code, *programs.items()) == [1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    assert (code.timeouts, code.crashes) == (0, 0)


def test_a_program_cannot_cheat() -> None:
    """A program does not get the expected results, and ending early or answering in place of the checker does not help."""
    programs = [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import os, json\nos.write(1, json.dumps(['5', \"'ab'\"]).encode())\nos._exit(0)",
        "import gc\nseen = [o for o in gc.get_objects() if isinstance(o, dict) and 'output' in o]\ndef add(a, b): return seen",
        "class Same(str):\n    __repr__ = lambda self: '5'\n    __eq__ = lambda *_: True\ndef add(a, b): return Same()",
    ]
    assert score(PythonCode(RewardConfig(timeout=60)), *((program, ADD) for program in programs)) == [0.0] * len(programs)


def test_a_program_is_alone_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    program = (
        "import os\ndef look():\n"
        "    return [sorted(os.environ.keys() - {'LC_CTYPE'}), os.listdir('.'), len(os.listdir('/proc/self/fd')) < 8]"
    )
    tests = [{"call": "look()", "output": "[[], [], True]"}]
    assert score(PythonCode(RewardConfig(timeout=60)), (program, tests)) == [1.0]


def test_what_a_program_does_too_much_of_makes_it_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = PythonCode(RewardConfig(timeout=60))
    bad = {
        f"data = bytearray({1 << 31})\n{ADDS}": ADD,
        f"open('big', 'w').write('x' * {1 << 22})\n{ADDS}": ADD,
        f"print('x' * {1 << 22})": SUM,
        f"files = [open('/dev/null') for _ in range({2 * sandbox.MAX_OPEN_FILES})]\n{ADDS}": ADD,
        "import ctypes; ctypes.string_at(0)": ADD,
    }
    assert score(code, *bad.items(), (ADDS, ADD)) == [0.0] * len(bad) + [1.0]
    assert (code.timeouts, code.crashes) == (0, 1)
    hurried = PythonCode(RewardConfig(timeout=2.0))
    assert score(hurried, ("while True: pass", ADD), ("import time; time.sleep(600)", ADD)) == [0.0, 0.0]
    assert (hurried.timeouts, hurried.crashes) == (2, 0)
    assert os.listdir(tmp_path) == []


def test_there_is_no_network() -> None:
    listener = (
        "import socket\ndef reach():\n    try:\n        server = socket.create_server(('127.0.0.1', 0))\n"
        "        socket.create_connection(server.getsockname(), 1)\n"
        "    except OSError as error:\n        return 'off'\n    return 'on'"
    )
    assert score(PythonCode(RewardConfig(timeout=60)), (listener, [{"call": "reach()", "output": "'off'"}])) == [1.0]


def test_children_of_a_program_end_with_it() -> None:
    if not HAS_NAMESPACES:
        pytest.skip("Linux namespaces are not permitted: a child that leaves its session can outlive the program")
    before = {process.pid for process in psutil.process_iter()}
    spawn = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(321)\n" + ADDS
    assert score(PythonCode(RewardConfig(timeout=60)), (spawn, ADD)) == [1.0]
    left = [p for p in psutil.process_iter() if p.pid not in before and sandbox.__file__ in " ".join(_command(p))]
    assert psutil.wait_procs(left, timeout=60)[1] == []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("tests", ["5", [], [{"call": "f()"}], [{"call": "f()", "output": 5}], {"call": "f()", "output": "5"}])
def test_an_answer_that_is_no_list_of_tests_is_an_error(tests: Tests | str) -> None:
    with pytest.raises(RewardError, match="prompt p: the answer is not a list of tests for python_code"):
        score(PythonCode(RewardConfig()), (ADDS, tests))


def test_a_sandbox_that_does_not_work_is_an_error_not_a_zero_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_code, "MEMORY_BYTES", 1 << 20)
    with pytest.raises(RewardError, match="sandbox of python_code does not run"):
        score(PythonCode(RewardConfig()), (ADDS, ADD))
