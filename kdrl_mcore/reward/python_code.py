"""`python_code`: a program is correct if it passes every test; tests run in separate processes that can be killed."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from threading import Lock
from typing import Any

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.resilience.interrupt import children_ignore_stop_signals
from kdrl_mcore.reward import sandbox
from kdrl_mcore.reward.answers import final_part
from kdrl_mcore.reward.registry import Reward, register_class
from kdrl_mcore.reward.verdicts import CRASH, TIMEOUT, Unjudged
from kdrl_mcore.types import Rollout

logger = logging.getLogger(__name__)

MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
"""The largest file that a program may write, into its own empty folder."""
MAX_OUTPUT_BYTES = 1 << 20
"""A program that prints more is wrong."""
PRECISE_DIGITS = 6
"""An expected decimal with at least this many digits after the point matches what it was truncated or rounded from."""
FLOAT_NOISE = Decimal("1e-9")
"""The rounding error by which a float may differ from the expected one, relative to it unless that is 0."""
_FENCE = re.compile(r"([ \t>]*)(`{3,}|~{3,})[ \t]*([^`\n]*)")
_THOUGHT = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
_STATEMENT = re.compile(
    r"^[ \t]*(?:import|from|def|class|for|while|if|with|try|print)\b|^[^'\"#\n]*[\w\])][ \t]*[=(]", re.MULTILINE
)
_PYTHON = re.compile(r"\{?\.?i?py(?:thon|con)?[\d.]*\b", re.IGNORECASE)
_FLOAT = re.compile(r"(?<![\w.])-?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w.])")
_SANDBOX = [sys.executable, "-I", "-S", sandbox.__file__]


@register_class("python_code")
class PythonCode(Reward):
    r"""1 if the program in the response's last fenced block (or the whole response, without one) passes every test, else 0.

    The tests are the row's answer: a JSON list of `{"call": "add(2, 3)", "output": "5"}`, with the `repr` of the value that the
    program returns, or `{"stdin": "2 3\n", "output": "5"}`, with the text that it prints (trailing white space of lines and
    white space around the text do not count, and floats may differ by rounding errors). A program never sees the expected
    output. `reward.timeout` limits the time of each process, and `reward.workers` the number of processes at once.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Take the settings; processes start with the first response."""
        self._timeout = config.timeout
        self._workers = config.workers
        self._probed = False
        self._lock = Lock()
        self.timeouts = 0
        self.crashes = 0

    @classmethod
    def why_refused(cls, answer: str) -> str | None:
        """See `Reward`."""
        tests = _tests(answer)
        if tests is None:
            return _NO_TESTS
        for call in [test["call"] for test in tests if "call" in test]:
            try:
                ast.parse(call.strip(), mode="eval")
            except (SyntaxError, ValueError) as error:
                return f"the call {call!r} is not an expression of Python ({error.args[0]})"
        return None

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """See `Reward`. Each distinct pair of program and tests runs once."""
        if not self._probed:
            self._probe()
        pairs = [(program_of(rollout.response), rollout.answer) for rollout in rollouts]
        tests = {rollout.answer: read_tests(rollout) for rollout in rollouts}
        distinct = list(dict.fromkeys(pairs))
        with ThreadPoolExecutor(self._workers) as threads:
            verdicts = dict(
                zip(distinct, threads.map(lambda pair: self._passes(pair[0], tests[pair[1]]), distinct), strict=True)
            )
        found = [verdicts[pair] for pair in pairs]
        return [verdict if isinstance(verdict, Unjudged) else float(verdict) for verdict in found]

    def _passes(self, program: str, tests: list[dict[str, str]]) -> bool | Unjudged:
        calls = [test for test in tests if "call" in test]
        if calls:
            answer = self._run({"program": program, "calls": [test["call"] for test in calls]})
            if isinstance(answer, Unjudged):
                return answer
            if not _is_list(answer, [test["output"] for test in calls]):
                return False
        for test in [test for test in tests if "stdin" in test]:
            printed = self._run({"program": program, "stdin": test["stdin"]})
            if isinstance(printed, Unjudged):
                return printed
            if not _prints(printed, test["output"]):
                return False
        return True

    def _run(self, request: dict[str, Any]) -> str | Unjudged | None:
        """The sandbox's answer; None if the program failed or printed too much, `Unjudged` if it was killed."""
        limits = [str(MEMORY_BYTES), str(int(self._timeout) + 1), str(FILE_BYTES)]
        # The folder and the empty environment keep the run's files, settings and secrets out of a program's usual reach; in a
        # new session its children can be killed with it.
        with tempfile.TemporaryDirectory(prefix="kdrl_code_") as folder, tempfile.TemporaryFile() as output:
            try:
                with children_ignore_stop_signals():
                    process = subprocess.Popen(
                        [*_SANDBOX, *limits],
                        cwd=folder,
                        env={},
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
            except OSError as error:
                raise RewardError(f"cannot start a process for a program ({error}): check the limit on processes") from error
            try:
                process.communicate(json.dumps(request).encode(), timeout=self._timeout)
            except subprocess.TimeoutExpired:
                with self._lock:
                    self.timeouts += 1
                return TIMEOUT
            finally:
                _kill(process)
            if process.returncode < 0 or process.returncode > sandbox.SIGNALLED:
                with self._lock:
                    self.crashes += 1
                return CRASH
            output.seek(0)
            text = output.read(MAX_OUTPUT_BYTES + 1)
        if process.returncode != 0 or len(text) > MAX_OUTPUT_BYTES:
            return None
        return text.decode(errors="replace")

    def _probe(self) -> None:
        """Check that the sandbox works: a broken one would make every program look wrong.

        Raises:
            RewardError: it does not work.
        """
        answer = self._run({"program": "import json, random\nx = 1", "calls": ["x"]})
        if answer != '[["1", "1"]]':
            raise RewardError("the sandbox of python_code does not run `x = 1`: check the limits on memory and processes")
        found = subprocess.run([*_SANDBOX, "--probe"], capture_output=True, text=True, env={}).stdout.strip()
        if found != "namespace":
            logger.warning(
                "python_code: Linux namespaces are not permitted here: only Python itself keeps programs off the network "
                "(docs/rewards.md)"
            )
        self._probed = True


def program_of(response: str) -> str:
    """The content of the last fenced block in Python, else of the last without a language (one with a statement, if any has),
    else of the last; without blocks the whole response. A thought before `</think>` counts only if no block follows it."""
    response = response.replace("\r\n", "\n").lstrip("\ufeff")
    blocks = _fenced(final_part(response)) or (_fenced(_THOUGHT.sub("\n", response)) if "</think" in response else [])
    if not blocks:
        return final_part(response)
    python = [block for language, block in blocks if _PYTHON.match(language)]
    bare = [block for language, block in blocks if not language]
    programs = [block for block in bare if _STATEMENT.search(block)]  # rather than the output that is shown after it
    return (python or programs or bare or [block for _, block in blocks])[-1]


def _fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block, between lines that begin with at least three backticks or tildes, with the
    fence's indentation removed. A block that is not closed ends with the text."""
    blocks: list[tuple[str, str]] = []
    fence, language, indent, lines = "", "", "", list[str]()
    for line in text.rstrip("\n").split("\n"):
        match = _FENCE.fullmatch(line.rstrip())
        if not fence:
            if match:
                indent, fence, language = match.groups()
        elif match and match[2].startswith(fence) and not match[3]:
            blocks.append((language.strip(), "".join(lines)))
            fence, lines = "", []
        else:
            lines.append(("" if line.rstrip() == indent.rstrip() else line.removeprefix(indent)) + "\n")
    return [*blocks, (language.strip(), "".join(lines))] if fence else blocks


def read_tests(rollout: Rollout) -> list[dict[str, str]]:
    """The tests of the response's prompt.

    Raises:
        RewardError: the answer is not a list of tests.
    """
    tests = _tests(rollout.answer)
    if tests is None:
        raise RewardError(f"prompt {rollout.prompt_id}: the answer is {_NO_TESTS}")
    return tests


_NO_TESTS = (
    'not a list of tests for python_code: write a JSON list of {"call": ..., "output": ...} or {"stdin": ..., "output": ...}'
)


def _tests(answer: str) -> list[dict[str, str]] | None:
    """The tests that an answer lists; None if it is not such a list."""
    try:
        tests = json.loads(answer)
    except ValueError:
        return None
    return tests if isinstance(tests, list) and tests and all(map(_is_test, tests)) else None


def _is_test(test: Any) -> bool:
    keys = ({"call", "output"}, {"stdin", "output"})
    return isinstance(test, dict) and set(test) in keys and all(isinstance(value, str) for value in test.values())


def _is_list(answer: str | None, expected: list[str]) -> bool:
    try:
        values = None if answer is None else json.loads(answer)
    except ValueError:
        return False
    return isinstance(values, list) and len(values) == len(expected) and all(map(_returns, values, expected))


def _returns(value: Any, expected: str) -> bool:
    """Whether the value of a call, as its `repr` and its plain form, is the expected one, however that is written."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return _same_value(value[0], expected) or _same_value(value[1], _plain(expected))


@lru_cache(maxsize=10_000)
def _plain(expected: str) -> str:
    """The plain form of a value that a test expects, written as in Python (`[1,2]`, `{3, 1}`) or in JSON (`true`); any other
    text unchanged."""
    for read in (ast.literal_eval, json.loads):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return sandbox.plain(read(expected.strip()))
    return expected


def _same_value(value: Any, expected: str) -> bool:
    """Whether a `repr` is the expected one; floats outside strings may differ as `_same_float` allows."""
    if value == expected or not isinstance(value, str):
        return bool(value == expected)
    if "'" in expected or '"' in expected or _FLOAT.sub("", value) != _FLOAT.sub("", expected):
        return False
    return all(map(_same_float, _FLOAT.findall(value), _FLOAT.findall(expected)))


def _prints(text: str | None, expected: str) -> bool:
    """Whether the text is the expected one, line by line; words that are floats in both may differ as `_same_float` allows."""
    lines, expected_lines = _lines(text), _lines(expected)
    if lines is None or expected_lines is None or len(lines) != len(expected_lines):
        return False
    return all(
        line == other or _same_words(line.split(), other.split()) for line, other in zip(lines, expected_lines, strict=True)
    )


def _same_words(words: list[str], expected: list[str]) -> bool:
    return len(words) == len(expected) and all(
        word == other or bool(_FLOAT.fullmatch(word) and _FLOAT.fullmatch(other) and _same_float(word, other))
        for word, other in zip(words, expected, strict=True)
    )


def _same_float(text: str, expected: str) -> bool:
    """Whether a float equals the expected one up to noise, or truncates or rounds to it if that has at least six decimals."""
    value, wanted = Decimal(text), Decimal(expected)
    decimals = -int(wanted.as_tuple().exponent)
    place = Decimal(1).scaleb(-decimals) if decimals >= PRECISE_DIGITS and "e" not in expected.lower() else Decimal(0)
    return abs(value - wanted) <= FLOAT_NOISE * (abs(wanted) or 1) or abs(value - wanted) < place


def _lines(text: str | None) -> list[str] | None:
    return None if text is None else [line.rstrip() for line in text.strip().split("\n")]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the program and every process in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
