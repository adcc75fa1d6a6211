"""`python_code`: a program is right where it passes every test; each runs in a process of its own that can be killed."""

from __future__ import annotations

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
from threading import Lock
from typing import Any

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.interrupt import children_ignore_stop_signals
from kdrl_mcore.reward import sandbox
from kdrl_mcore.reward.registry import Reward, register_class
from kdrl_mcore.types import Rollout

logger = logging.getLogger(__name__)

MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
"""The largest file a program may write into its own empty folder."""
MAX_OUTPUT_BYTES = 1 << 20
"""A program that prints more is wrong."""
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_SANDBOX = [sys.executable, "-I", "-S", sandbox.__file__]


@register_class("python_code")
class PythonCode(Reward):
    r"""1 where the program in the response's last fenced block (or the whole response, without one) passes every test.

    The tests are the row's answer: a JSON list of `{"call": "add(2, 3)", "output": "5"}`, the `repr` of a value of the
    program's own, or `{"stdin": "2 3\n", "output": "5"}`, what the program prints (white space at the ends of lines and of the
    text does not count). A program never sees what is expected. `reward.timeout` bounds each process, `reward.workers` how many
    run at once.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Starts nothing."""
        self._timeout = config.timeout
        self._workers = config.workers
        self._probed = False
        self._lock = Lock()
        self.timeouts = 0
        self.crashes = 0

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """See `Reward`. Each distinct pair of program and tests is run once."""
        if not self._probed:
            self._probe()
        pairs = [(program_of(rollout.response), rollout.answer) for rollout in rollouts]
        tests = {rollout.answer: read_tests(rollout) for rollout in rollouts}
        distinct = list(dict.fromkeys(pairs))
        with ThreadPoolExecutor(self._workers) as threads:
            verdicts = dict(
                zip(distinct, threads.map(lambda pair: self._passes(pair[0], tests[pair[1]]), distinct), strict=True)
            )
        return [float(verdicts[pair]) for pair in pairs]

    def _passes(self, program: str, tests: list[dict[str, str]]) -> bool:
        calls = [test for test in tests if "call" in test]
        if calls:
            answer = self._run({"program": program, "calls": [test["call"] for test in calls]})
            if not _is_list(answer, [test["output"] for test in calls]):
                return False
        scripts = [test for test in tests if "stdin" in test]
        return all(
            _lines(self._run({"program": program, "stdin": test["stdin"]})) == _lines(test["output"]) for test in scripts
        )

    def _run(self, request: dict[str, Any]) -> str | None:
        """What the sandbox answers; None where the program failed, printed too much or was killed."""
        limits = [str(MEMORY_BYTES), str(int(self._timeout) + 1), str(FILE_BYTES)]
        # The folder and the empty environment keep the program from the run's files, settings and secrets as far as it asks by
        # the usual ways; a session of its own lets its children be killed with it.
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
                return None
            finally:
                _kill(process)
            if process.returncode < 0 or process.returncode > sandbox.SIGNALLED:
                with self._lock:
                    self.crashes += 1
            output.seek(0)
            text = output.read(MAX_OUTPUT_BYTES + 1)
        if process.returncode != 0 or len(text) > MAX_OUTPUT_BYTES:
            return None
        return text.decode(errors="replace")

    def _probe(self) -> None:
        """Check that the sandbox works: a broken one would pass for wrong programs.

        Raises:
            RewardError: it does not.
        """
        answer = self._run({"program": "import json, random\nx = 1", "calls": ["x"]})
        if answer != '["1"]':
            raise RewardError("the sandbox of python_code does not run `x = 1`: check the limits on memory and processes")
        found = subprocess.run([*_SANDBOX, "--probe"], capture_output=True, text=True, env={}).stdout.strip()
        if found != "namespace":
            logger.warning(
                "python_code: Linux namespaces are not permitted here: programs are kept from the network inside Python only "
                "(docs/rewards.md)"
            )
        self._probed = True


def program_of(response: str) -> str:
    """The content of the response's last fenced block, or the whole response where it has none."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


def read_tests(rollout: Rollout) -> list[dict[str, str]]:
    """The tests of the response's prompt.

    Raises:
        RewardError: the answer is no list of tests.
    """
    try:
        tests = json.loads(rollout.answer)
    except ValueError:
        tests = None
    if not isinstance(tests, list) or not tests or not all(map(_is_test, tests)):
        raise RewardError(
            f"prompt {rollout.prompt_id}: the answer is no list of tests for python_code: write a JSON list of "
            '{"call": ..., "output": ...} or {"stdin": ..., "output": ...}'
        )
    return tests


def _is_test(test: Any) -> bool:
    keys = ({"call", "output"}, {"stdin", "output"})
    return isinstance(test, dict) and set(test) in keys and all(isinstance(value, str) for value in test.values())


def _is_list(answer: str | None, expected: list[str]) -> bool:
    try:
        return answer is not None and json.loads(answer) == expected
    except ValueError:
        return False


def _lines(text: str | None) -> list[str] | None:
    return None if text is None else [line.rstrip() for line in text.strip().split("\n")]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the program and whatever it started in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
