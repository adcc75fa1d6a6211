"""Kill a process that does nothing but save, many times: python -m tests.support.kill_while_saving FOLDER KILLS.

It prints one word per kill: `whole` if the checkpoint that `latest` names has every byte it was written with. A process that
has imported everything forks each victim, so a kill costs no start-up time.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import time
from pathlib import Path

from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

prepare_platform()

from kdrl_mcore.checkpointing.checkpoint import LATEST  # noqa: E402
from kdrl_mcore.checkpointing.manifest import checksum, files_below, read_manifest  # noqa: E402
from kdrl_mcore.checkpointing.writer import CheckpointWriter  # noqa: E402
from kdrl_mcore.config import load_config  # noqa: E402
from kdrl_mcore.student.student import Student  # noqa: E402
from tests.support.launching import WriteResults  # noqa: E402


def save_forever(folder: Path, directory: Path, first: int) -> None:
    """Save checkpoint after checkpoint asynchronously; each save completes the one before it."""
    initialize_distributed(timeout_minutes=5)
    config = load_config([f"student.path={folder}/student", "objective=grpo", "optimizer.name=sgd"])
    student = Student(config, world_size=1, vocab_size=60)
    writer = CheckpointWriter(directory, keep=2, asynchronous=True)
    for step in range(first, 10**6):
        writer.save(step, student, {"step": step})


def is_whole(path: Path) -> bool:
    """Whether the manifest describes exactly the files that exist."""
    return checksum(path, files_below(path)) == read_manifest(path)


def main(folder: Path, kills: int) -> None:
    """Kill one victim after another, each with the processes it started, at a random moment of its second save or later."""
    moments = random.Random(0)
    directory = folder / "run" / "checkpoints"
    directory.parent.mkdir()
    results = WriteResults()
    gc.collect()
    gc.freeze()  # as in `launching`
    for _ in range(kills):
        latest = directory / LATEST
        before = latest.readlink().name if latest.is_symlink() else "step_000000"
        first = int(before.removeprefix("step_")) + 1
        victim = os.fork()
        if victim == 0:
            os.setsid()
            results.use()
            save_forever(folder, directory, first)
        while not latest.is_symlink() or latest.readlink().name == before:
            time.sleep(0.002)
            assert os.waitpid(victim, os.WNOHANG) == (0, 0), "the process that saves ended by itself"
        time.sleep(moments.uniform(0, 0.3))
        os.killpg(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        print("whole" if is_whole(directory / latest.readlink()) else f"damaged:{latest.readlink()}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
