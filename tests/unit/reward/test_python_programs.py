"""Right programs pass in the many styles that models write and however they are fenced; wrong ones do not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.reward.python_code import PythonCode, _prints, _same_value, program_of
from kdrl_mcore.types import Rollout

SUM = [{"stdin": "2 3\n", "output": "5"}]
NO_NEWLINE = [{"stdin": "2 3", "output": "5\n"}]
ADD = [{"call": "add(2, 3)", "output": "5"}]
SUMS = "a, b = map(int, input().split())\nprint(a + b)\n"
ADDS = "def add(a, b):\n    return a + b\n"

RIGHT = [
    "import sys\ninput = sys.stdin.readline\n" + SUMS,
    "import sys\ninput = sys.stdin.buffer.readline\n" + SUMS,
    "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "print(sum(map(int, open(0).read().split())))",
    "print(sum(map(int, open(0, 'rb').read().split())))",
    "print(sum(map(int, open('/dev/stdin').read().split())))",
    "import os\nprint(sum(map(int, os.read(0, 99).split())))",
    "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
    "import sys, io\nsys.stdin = io.TextIOWrapper(sys.stdin.buffer)\n" + SUMS,
    "import sys\nsys.stdin.reconfigure(encoding='utf-8')\n" + SUMS,
    "import fileinput\nfor line in fileinput.input():\n    print(sum(map(int, line.split())))",
    "import os, io\nlines = io.BytesIO(os.read(0, os.fstat(0).st_size))\nprint(sum(map(int, lines.readline().split())))",
    "import sys\nprint(sum(map(int, next(sys.stdin).split())))",
    SUMS + "exit()",
    SUMS + "quit()",
    SUMS + "exit(0)",
    SUMS + "import sys\nsys.exit()",
    SUMS + "raise SystemExit",
    "def main():\n    a, b = map(int, input().split())\n    print(a + b)\nif __name__ == '__main__':\n    main()",
    "import threading\nthreading.stack_size(1 << 26)\ndef main():\n    print(sum(map(int, input().split())))\n"
    "threading.Thread(target=main).start()",
    "import pickle\nclass P:\n    def __init__(self, x): self.x = x\n"
    "print(pickle.loads(pickle.dumps(P(sum(map(int, input().split()))))).x)",
    "import sys\nassert len(sys.argv) == 1 and __file__\n" + SUMS,
    "def f(x: int): return x\nassert f.__annotations__['x'] is int\n" + SUMS,
    "import sys\nassert sys.modules['__main__'].__dict__ is globals()\n" + SUMS,
    "def deep(n): return 0 if n == 0 else 1 + deep(n - 1)\nassert deep(980) == 980\n" + SUMS,
    "import sys\nsys.setrecursionlimit(10**6)\ndef deep(n): return 0 if n == 0 else 1 + deep(n - 1)\ndeep(20000)\n" + SUMS,
    "try:\n    while True:\n        print(sum(map(int, input().split())))\nexcept EOFError:\n    pass",
    "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.readline().split()))))",
    "import sys\nprint('working', file=sys.stderr)\n" + SUMS,
    "from __future__ import annotations\n" + SUMS,
]
CALLED = [
    ADDS,
    "add = lambda a, b: a + b",
    ADDS + "exit()",
    ADDS + "if __name__ == '__main__':\n    print(add(*map(int, input().split())))",
    ADDS + "print(add(1, 1))\nassert add(1, 1) == 2",
    "class Solution:\n    def add(self, a, b): return a + b\nadd = Solution().add",
]
WRONG = [
    ("print(6)", SUM), ("a, b = input().split()\nprint(a + b)", SUM), (SUMS + "print(1)", SUM), (SUMS + "exit(1)", SUM),
    (SUMS + "raise ValueError", SUM), ("exit()", SUM), ("exit()", ADD), ("quit()\n" + ADDS, ADD), (ADDS + "exit(1)", ADD),
    ("import os\nos.close(0)\n" + SUMS, SUM), ("print(open('/proc/self/cmdline').read())", SUM), ("", SUM),
    ("import sys\nsys.exit('5')", SUM), ("print(5.0)", SUM), ("print('5 ' * 2)", SUM),
]  # fmt: skip


def score(code: PythonCode, programs: list[tuple[str, list[dict[str, str]]]]) -> list[float]:
    ids = np.zeros(1, np.int64)
    return code.score(
        [
            Rollout("p", 0, ids, ids, np.zeros(1, np.float32), "stop", 0, response=program, answer=json.dumps(tests))
            for program, tests in programs
        ]
    )


def test_right_programs_of_every_style_pass() -> None:
    programs = [(f"```python\n{program}\n```", SUM) for program in RIGHT]
    programs += [(program, NO_NEWLINE) for program in RIGHT[:6]] + [(program, ADD) for program in CALLED]
    code = PythonCode(RewardConfig(timeout=60))
    verdicts = score(code, programs)
    assert [program for (program, _), verdict in zip(programs, verdicts, strict=True) if verdict != 1.0] == []
    assert code.timeouts == 0


def test_wrong_programs_do_not_pass() -> None:
    verdicts = score(PythonCode(RewardConfig(timeout=60)), WRONG)
    assert [program for (program, _), verdict in zip(WRONG, verdicts, strict=True) if verdict != 0.0] == []


def test_a_large_input_arrives_whole() -> None:
    numbers = " ".join(map(str, range(400_000)))
    tests = [{"stdin": numbers, "output": str(sum(range(400_000)))}]
    programs = ["print(sum(map(int, input().split())))", "print(sum(map(int, open('/dev/stdin').read().split())))"]
    assert score(PythonCode(RewardConfig(timeout=60)), [(program, tests) for program in programs]) == [1.0, 1.0]


@pytest.mark.parametrize(
    "response",
    [
        f"{fence}{language}\nx = 1\n{fence}"
        for fence in ("```", "````", "~~~")
        for language in ("python", "Python", "PYTHON", "py", "python3", "py3", " python", "", "{python}", "python {.a}")
    ]
    + [
        "```python\r\nx = 1\r\n```\r\nDone.",
        "1. Do\n\n   ```python\n   x = 1\n   ```\n",
        "```bash\npython a.py\n```\nThen:\n```python\nx = 1\n```\n```text\n5\n```",
        "```\n2 3\n```\n```python\nx = 1\n```\n```\n5\n```",
        "```sh\n$ run\n```\n```\nx = 1\n```",
        "```python\ny = 2\n```\nBetter:\n```py\nx = 1\n```",
        "```code\nx = 1\n```",
        "```python\nx = 1\n",
        "<think>```python\ny = 2\n```</think>\n```python\nx = 1\n```",
        "<think>```python\nx = 1\n```\n</think>\nThat is it.",
        "Use `a` and ``` ``b`` ```.\n```python\nx = 1\n```",
        "> ```python\n> x = 1\n> ```",
        "\ufeff```python\nx = 1\n```",
        "```\nx = 1\n```\nFor\n```\n2 3\n```\nit prints\n```\n5\n```",
    ],
)  # fmt: skip
def test_fences(response: str) -> None:
    assert program_of(response) == "x = 1\n"


def test_a_fence_in_a_program_does_not_end_it() -> None:
    assert program_of("````python\ns = '''\n```\n'''\n````") == "s = '''\n```\n'''\n"
    assert program_of("~~~python\ns = '''\n```\n'''\n~~~") == "s = '''\n```\n'''\n"
    assert program_of("<think>```python\nx = 1\n```") == ""


@pytest.mark.parametrize(
    ("printed", "expected", "right"),
    [
        ("0.30000000000000004", "0.3", True),
        ("0.3333333333333333", "0.333333", True),
        ("3.0 4.5\n", "3.00 4.50", True),
        ("1e-07", "0.0000001", True),
        ("0.3333333333333333", "0.33", False),
        ("0.3334", "0.333333", False),
        ("1e-8", "2e-8", False),
        ("1234567.25", "1234567.75", False),
        ("5.0", "5", False),
        ("5", "5.0", False),
        ("1.5 2.5", "1.5", False),
        ("1.5\n2.5", "1.5 2.5", False),
        ("v1.50", "v1.5", False),
        ("nan", "0.0", False),
    ],
)
def test_floats_that_are_printed(printed: str, expected: str, right: bool) -> None:
    assert _prints(printed, expected) == right


@pytest.mark.parametrize(
    ("value", "expected", "right"),
    [
        ("0.30000000000000004", "0.3", True),
        ("[0.1, 0.30000000000000004]", "[0.1, 0.3]", True),
        ("(1, 2)", "[1, 2]", False),
        ("1.0", "1", False),
        ("'1.50'", "'1.5'", False),
        ("[0.1]", "[0.1, 0.2]", False),
        (None, "None", False),
    ],
)
def test_floats_that_are_returned(value: str | None, expected: str, right: bool) -> None:
    assert _same_value(value, expected) == right


FORMS: list[tuple[str, str, bool]] = [
    ("[0, 1]", "[0,1]", True),
    ("'a'", '"a"', True),
    ("True", "true", True),
    ("[True, None]", "[true,null]", True),
    ("{'c', 'a', 'b'}", "{'b', 'a', 'c'}", True),
    ("{'b': {2, 1}, 'a': 1}", "{'a': 1, 'b': {1, 2}}", True),
    ("__import__('collections').Counter('aab')", "{'b': 1, 'a': 2}", True),
    ("__import__('collections').Counter('a')", "Counter({'a': 1})", True),
    ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)", True),
    ("[1, 1/3]", "[1,0.3333333333]", True),
    ("(1,)", "(1,)", True),
    ("set()", "set()", True),
    ("set()", "{}", False),
    ("1", "true", False),
    ("(1, 2)", "[1,2]", False),
    ("{'c', 'a'}", "{'b', 'a', 'c'}", False),
    ("'5'", "5", False),
    ("5", "'5'", False),
    ("[1, 2]", "[2,1]", False),
    ("[1, 2]", " [1,2]\n", True),
]
"""A value, the value that a test expects, and whether they agree."""


def test_values_agree_however_they_are_written() -> None:
    """The printed order of a set of strings changes with every process, and nobody writes a list as `repr` does."""
    calls = [
        (f"```python\ndef f(): return {value}\n```", [{"call": "f()", "output": expected}]) for value, expected, _ in FORMS
    ]
    assert [bool(one) for one in score(PythonCode(RewardConfig(timeout=60)), calls)] == [right for *_, right in FORMS]


def test_a_call_that_is_no_expression_is_refused() -> None:
    for call in ("assert f(1) == 2", "x = f(1)", "f(1", "f(1)\nf(2)"):
        assert "is not an expression of Python" in str(PythonCode.why_refused(json.dumps([{"call": call, "output": "2"}])))
    assert PythonCode.why_refused(json.dumps([{"call": " f(1)[0].x\n", "output": "2"}])) is None
