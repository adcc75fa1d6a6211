"""Runs one untrusted program in a separate process, in an empty folder:

    python -I -S sandbox.py MEMORY_BYTES CPU_SECONDS FILE_BYTES

The parent (`python_code.py`) sends `{"program": ..., "calls": [...]}` or `{"program": ..., "stdin": ...}` as JSON on standard
input. With calls, the program is executed and each call evaluated; the answer is a JSON list with the `repr` of each value and
its `plain` form, or null if the call raised. With `stdin`, the program runs as a script, and the answer is what it prints. The
request never contains the expected output, so a program cannot look it up. Only the standard library is imported: this must
start in milliseconds.

The kernel limits memory, CPU time, file size, open files and processes, and forbids core dumps and new privileges. Where Linux
namespaces are permitted (to root, or with unprivileged user namespaces), the program has no network, and all its processes end
with it. Otherwise sockets are blocked only inside Python, which a determined program can undo (through ctypes), and a child
that leaves its session can outlive it; `--probe` prints which applies here. Root becomes `nobody` if that user can read the
Python installation. The file system is not protected: the program can read every file that its user can read.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import resource
import signal
import sys
import types
from _sitebuiltins import Quitter

_CLONE_NEWNET, _CLONE_NEWPID, _CLONE_NEWUSER = 0x40000000, 0x20000000, 0x10000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
MAX_OPEN_FILES = 32
MAX_PROCESSES = 32
"""The kernel counts all processes of the user, so this must not be smaller; it does not count root's."""
NOBODY = 65534
OWN_FRAMES = 20
"""The number by which the recursion limit is raised, for this file's frames below those of the program."""
SIGNALLED = 128
"""A program that a signal ended exits with this plus the signal's number."""


def isolate() -> bool:
    """Leave the parent's network, and let the next child start a new process namespace; returns whether that is permitted."""
    unshare, own = ctypes.CDLL(None).unshare, _CLONE_NEWNET | _CLONE_NEWPID
    return unshare(own) == 0 or unshare(_CLONE_NEWUSER | own) == 0


def confine(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """Give up what a program under test does not need, irreversibly for this process and its children."""
    if isolate():
        _continue_in_child()
    else:
        sys.addaudithook(_refuse_sockets)
    _die_with_parent()
    if os.getuid() == 0:
        _become_nobody()
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: MAX_PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _continue_in_child() -> None:
    """Fork, and return in the child. It is the first process of its namespace: when it ends, so do all others in it."""
    _die_with_parent()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else SIGNALLED - code)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _become_nobody() -> None:
    os.chown(".", NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, 0)
    if not os.access(ctypes.__file__, os.R_OK):
        os.setresuid(0, 0, 0)
        return
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _die_with_parent()  # a change of user clears it
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # makes /proc/self, and with it /dev/stdin, accessible again


def _refuse_sockets(event: str, _: object) -> None:
    if event.startswith("socket."):
        raise PermissionError("the network is disabled")


def feed(text: str) -> None:
    """Replace standard input with this text, for `sys.stdin`, descriptor 0 and /dev/stdin alike."""
    file = os.memfd_create("stdin")
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(text.encode(errors="surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    vars(sys)["__stdin__"] = sys.stdin  # keeps the buffer open if a program wraps it again


def as_script() -> dict[str, object]:
    """The scope of a module `__main__` that runs as a script without arguments, with the built-ins that `site` adds."""
    module = types.ModuleType("__main__")
    module.__file__ = "program.py"
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    sys.setrecursionlimit(sys.getrecursionlimit() + OWN_FRAMES)
    for name in ("exit", "quit"):
        setattr(builtins, name, Quitter(name, "Ctrl-D (i.e. EOF)"))
    return module.__dict__


def execute(program: str, scope: dict[str, object]) -> None:
    """Run the program's text, without this file's `from __future__` imports."""
    exec(compile(program, "program.py", "exec", dont_inherit=True), scope)


def plain(value: object) -> str:
    """The `repr` of a value in which equal values are written alike: sets and dictionaries in the order of their members'
    texts, subclasses (a Counter, a named tuple) as what they are subclasses of."""
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{plain(key)}: {plain(each)}" for key, each in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(plain, value))) + "}" if value else "set()"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(plain, value)) + ("," if len(value) == 1 else "") + ")"
    return "[" + ", ".join(map(plain, value)) + "]" if isinstance(value, list) else repr(value)


def run(request: dict[str, object]) -> None:
    """Execute the program and write the answer to standard output."""
    scope, program = as_script(), str(request["program"])
    if "stdin" in request:
        execute(program, scope)
        sys.stdout.flush()
        return
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints is not part of the answer
    try:
        execute(program, scope)
    except (SystemExit, EOFError) as ended:  # a script may exit, or read input that it does not have
        if isinstance(ended, SystemExit) and ended.code not in (None, 0):
            raise
    values: list[tuple[str, str] | None] = []
    for call in request["calls"]:  # type: ignore[attr-defined]
        try:
            value = eval(compile(call.strip(), "call", "eval", dont_inherit=True), scope)
            values.append((repr(value), plain(value)))
        except Exception:
            values.append(None)
    os.write(answers, json.dumps(values).encode())


if __name__ == "__main__":
    if sys.argv[1] == "--probe":
        print("namespace" if isolate() else "python")
    else:
        task, limits = json.loads(sys.stdin.buffer.read()), list(map(int, sys.argv[1:4]))
        feed(str(task.get("stdin", "")))  # before the limit on the size of files
        confine(*limits)
        run(task)
