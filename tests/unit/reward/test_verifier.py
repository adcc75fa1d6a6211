r"""The verifier's judgement, and that no answer can harm it, the machine or another answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.reward import rules
from kdrl_mcore.reward.pool import WorkerPool
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.types import FinishReason, Rollout

OwnWorkers = Callable[[], list[psutil.Process]]

HOSTILE_FUNCTION = '''
import ctypes, os, sys, time

def compare(reference, answer):
    """Obeys the answer: what a buggy or exploited comparison could do to its process."""
    print("noise on standard output", flush=True)
    if answer == "loop":
        while True:
            pass
    if answer == "hold the interpreter lock":
        9**9**9
    if answer.startswith("crash") or reference.startswith("crash"):
        ctypes.string_at(0)
    if answer == "eat memory":
        bytearray(1 << 34)
    if answer == "raise":
        raise ValueError(answer)
    if answer == "exit":
        sys.exit(0)
    if answer.startswith("write "):
        open(answer.split()[1], "w").close()
    if answer.startswith("wait for "):
        while not os.path.exists(answer.split()[2]):
            time.sleep(0.01)
        return True
    if answer == "modules":
        return "torch" not in sys.modules and "hydra" not in sys.modules
    return reference == answer
'''


def rollout(response: str, answer: str, finish_reason: FinishReason = "stop") -> Rollout:
    ids = np.zeros(1, np.int64)
    return Rollout("p", 0, ids, ids, np.zeros(1, np.float32), finish_reason, 0, response=response, answer=answer)


def boxed(answer: str, reference: str) -> Rollout:
    return rollout(f"so it is \\boxed{{{answer}}}", reference)


def workers_of(process: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(process).children() if "kdrl_mcore.reward.worker" in child.cmdline()]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(RewardConfig(timeout=60)) as verifier:  # no answer may time out because this machine is busy
        yield verifier


@pytest.fixture
def own_workers() -> OwnWorkers:
    """Returns the worker processes that were started since the test began and are still alive."""
    before = workers_of(os.getpid())
    return lambda: [worker for worker in workers_of(os.getpid()) if worker not in before]


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "hostile_function.py").write_text(HOSTILE_FUNCTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "hostile_function:compare"


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("25", "25"),
        ("1/2", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"$\frac{1}{2}$", r"\dfrac12"),
        ("1234", "1,234"),
        ("5.0", "5"),
        ("5", "5."),
        ("50%", r"50\%"),
        (r"50\%", r"50 \%"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("5", r"5\text{ cm}"),
        ("18", r"\$18"),
        (r"90^\circ", "90"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("1,2", "2, 1"),
        ("[1,2)", "[1, 2)"),
        ("1<x<2", "(1,2)"),
        (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
        ("5", "x=5"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
        ("C", r"\text{(C)}"),
    ],
)
def test_right_answers(verifier: Verifier, reference: str, answer: str) -> None:
    one = boxed(answer, reference)
    verifier.score([one])
    assert (one.correct, one.reward) == (True, 1.0)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("25", "26"),
        ("1/2", r"\frac{1}{3}"),
        ("0.5", "0.51"),
        ("50%", r"51\%"),
        (r"\{1,2\}", r"\{1,3\}"),
        ("[1,2)", "(1,2)"),
        ("C", r"\text{(B)}"),
        ("x^2+2x+1", "(x-1)^2"),
        ("12", "1 2"),
        ("12", "it is 12 or 13"),
        ("12", ""),
    ],
)
def test_wrong_answers(verifier: Verifier, reference: str, answer: str) -> None:
    one = boxed(answer, reference)
    verifier.score([one])
    assert (one.correct, one.reward) == (False, 0.0)


def test_an_answer_outside_a_box_is_incorrect(verifier: Verifier) -> None:
    some = [rollout("25", "25"), rollout(r"\boxed{25} or \boxed{26}", "25"), rollout(r"\boxed{25", "25")]
    verifier.score(some)
    assert [one.correct for one in some] == [False, False, False]


def test_reward_values_and_format_bonus_leave_correctness_alone() -> None:
    some = [
        rollout(r"\boxed{25}", "25"),
        rollout(r"\boxed{26}", "25"),
        rollout(r"\boxed{25}", "25", "length"),
        rollout(r"\boxed{1}\boxed{25}", "25"),
        rollout("25", "25"),
        rollout(r"\boxed{25", "25"),
    ]
    with Verifier(RewardConfig(correct=0.25, incorrect=-1.0, format_bonus=2.0)) as verifier:
        verifier.score(some)
    assert [one.reward for one in some] == [2.25, 1.0, 0.25, 0.25, -1.0, -1.0]
    assert [one.correct for one in some] == [True, False, True, True, False, False]


@pytest.mark.parametrize(
    ("response", "reference", "correct"),
    [
        (" Paris\n", "Paris", True),
        ("the  answer\nis Paris", "the answer is Paris", True),
        (r"I say \boxed{Paris}", "Paris", True),
        (r"I say \boxed{Paris}", r"\boxed{Paris}", True),
        ("paris", "Paris", False),
        (r"\boxed{0.5}", "1/2", False),
        (r"Paris \boxed{", r"Paris \boxed{", False),
        ("<think>Rome? No.</think>\nParis", "Paris", True),
        (r"<think>\boxed{Rome}</think> \boxed{Paris}", "Paris", True),
        (r"<think>\boxed{Paris}</think> It is Paris.", "Paris", True),
        (r"<think>\boxed{Paris}</think> \boxed{Rome}", "Paris", False),
        (r"<think>\boxed{Paris} wait", "Paris", False),
        ("<think>Paris", "Paris", False),
    ],
)
def test_exact_match(own_workers: OwnWorkers, response: str, reference: str, correct: bool) -> None:
    one = rollout(response, reference)
    with Verifier(RewardConfig(kind="exact_match")) as verifier:
        verifier.score([one])
        assert own_workers() == []
    assert (one.correct, one.reward) == (correct, float(correct))


def test_a_missing_reference_is_an_error(verifier: Verifier) -> None:
    with pytest.raises(RewardError, match="prompt p has no reference answer"):
        verifier.score([boxed("1", " ")])


def test_plain_integers_start_no_worker(own_workers: OwnWorkers) -> None:
    some = [boxed(str(i), str(i + i % 2)) for i in range(128)]
    with Verifier(RewardConfig()) as verifier:
        verifier.score(some)
        assert own_workers() == []
    assert [one.correct for one in some] == [i % 2 == 0 for i in range(128)]


def test_hostile_answers_have_no_effect(tmp_path: Path) -> None:
    """Some of them would never end."""
    target = tmp_path / "touched"
    hostile = [
        "9**9**9",
        "9^{9^{9}}",
        f"__import__('os').system('touch {target}')",
        r"\sum_{n=1}^{10^{12}} \frac{1}{n^2}",
        "10^{10^{10^{10}}}!",
        "{" * 900 + "1" + "}" * 900,
        r"\frac{1}{" * 190 + "1" + "}" * 190,
        r"\int_0^1 x^{x^{x^{x}}} dx",
    ]
    some = [boxed(answer, "3/4") for answer in hostile]
    some.append(boxed(r"\frac{1}{" * 120_000, "3/4"))  # a megabyte
    some.append(rollout(r"\frac{1}{2} " * 90_000 + r"\boxed{\frac{3}{4}}", "3/4"))
    some += [boxed("0.75", "3/4"), boxed(r"\frac{6}{8}", "3/4"), boxed("0.74", "3/4")]
    with Verifier(RewardConfig(timeout=4.0)) as verifier:
        verifier.score(some)
    assert [one.correct for one in some] == [False] * (len(hostile) + 1) + [True, True, True, False]
    assert not target.exists()


def test_the_verdicts_of_other_answers_survive_what_one_does_to_its_process(
    hostile: str, own_workers: OwnWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MATH_VERIFY", hostile)
    bad = ["loop", "hold the interpreter lock", "crash", "raise", "exit", "eat memory"]
    some = [boxed(answer, "a") for answer in ["b", *bad, "c"]] + [boxed("modules", f"a{i}") for i in range(20)]
    with Verifier(RewardConfig(timeout=4.0)) as verifier:
        verifier.score(some)
        assert (verifier.timeouts, verifier.crashes) == (2, 4)
        assert len(own_workers()) <= 2
        again = [boxed("modules", "a"), boxed("x", "y")]
        verifier.score(again)
    assert [one.correct for one in some] == [False] * 8 + [True] * 20
    assert [one.correct for one in again] == [True, False]
    assert own_workers() == []


def test_a_reference_that_nothing_can_be_compared_with_is_given_up(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 answers do not cost one time-out each, and a response with many hostile answers is still judged, whatever comes
    first."""
    monkeypatch.setattr(rules, "MATH_VERIFY", hostile)
    bad = [rollout(f"\\boxed{{{number}/7}}", "crash with anything") for number in range(40)]
    fine = [rollout(f"\\boxed{{crash {number}}}", "a") for number in range(12)] + [rollout(r"\boxed{modules}", "a")]
    with Verifier(RewardConfig(timeout=60)) as verifier:
        verifier.score([*bad, *fine])
        assert verifier.crashes == 8 + 1 + 12
    assert [each.correct for each in (*bad, *fine)] == [False] * 52 + [True]


def test_other_answers_go_on_while_one_hangs(hostile: str, tmp_path: Path) -> None:
    """The first answer waits for a file that the last one writes."""
    file = tmp_path / "written"
    pool = WorkerPool(hostile, workers=2, timeout=60)
    verdicts = pool.compare(
        [("a", f"wait for {file}"), *((str(i), "modules") for i in range(200)), (f"write {file}", f"write {file}")]
    )
    pool.close()
    assert verdicts == [True] * 202
    assert pool.timeouts == 0


def test_a_worker_killed_while_idle_is_replaced(hostile: str, own_workers: OwnWorkers) -> None:
    pool = WorkerPool(hostile, workers=1, timeout=60)
    assert pool.compare([("a", "modules")]) == [True]
    (worker,) = own_workers()
    worker.kill()
    psutil.wait_procs([worker], timeout=60)
    assert pool.compare([("a", "modules")]) == [True]
    assert pool.crashes == 0
    pool.close()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def compare(reference, answer): return False", "does not find 1 equal to 1"),
        ("def compare(reference, answer): __import__('os')._exit(7)", "exit code 7"),
        ("", "has no attribute 'compare'"),
    ],
)
def test_a_verifier_that_does_not_work_is_an_error_not_a_zero_reward(
    tmp_path: Path, own_workers: OwnWorkers, monkeypatch: pytest.MonkeyPatch, source: str, cause: str
) -> None:
    (tmp_path / "broken_function.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rules, "MATH_VERIFY", "broken_function:compare")
    with Verifier(RewardConfig()) as verifier, pytest.raises(RewardError, match=cause):
        verifier.score([boxed("1/2", "0.5")])
    assert own_workers() == []


def test_a_verifier_that_breaks_later_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "later_function.py"
    source.write_text("import os\ndef compare(reference, answer): return reference == '1' or os._exit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = WorkerPool("later_function:compare", workers=1, timeout=60)
    assert pool.compare([("1", "b")]) == [True]
    source.write_text("raise ImportError('the file system is gone')")
    with pytest.raises(RewardError, match="the file system is gone"):
        pool.compare([("a", "b"), ("c", "d")])


@pytest.mark.parametrize("answer", ["modules", "loop", "hold the interpreter lock"])
def test_no_worker_outlives_a_killed_parent(hostile: str, tmp_path: Path, answer: str) -> None:
    script = (
        "from kdrl_mcore.reward.pool import WorkerPool\n"
        f"pool = WorkerPool({hostile!r}, workers=1, timeout=1)\n"
        "pool.compare([('a', 'modules')])\n"
        "pool._timeout = 60\n"  # the parent does not get to kill the worker
        "print('up', flush=True)\n"
        f"pool.compare([('a', {answer!r})])\n"
        "__import__('time').sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    workers = workers_of(parent.pid)
    time.sleep(0.3)  # the worker has its pair
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 1
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_no_worker_outlives_a_parent_that_ends_without_closing(tmp_path: Path) -> None:
    script = (
        "import psutil\n"
        "from kdrl_mcore.reward.pool import WorkerPool\n"
        "pool = WorkerPool('kdrl_mcore.reward.equivalence:equivalent', workers=1, timeout=60)\n"
        "assert pool.compare([('1/2', '0.5')]) == [True]\n"
        "print(*(child.pid for child in psutil.Process().children()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    (pid,) = map(int, result.stdout.split())
    assert not psutil.pid_exists(pid)
