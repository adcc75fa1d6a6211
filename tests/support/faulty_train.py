"""`kdrl_mcore.train` in which engines are killed or hang at chosen moments: python -m tests.support.faulty_train KEY=VALUE ...

At the beginning of step 2, engine 1 is killed while idle. In step 3, after a few responses, engine 0 is killed and vLLM hangs
in engine 1, whose server still answers. In step 4, in the middle of the refit, engine 1 is killed and all of engine 0 hangs.
In step 5, engine 0 is killed and cannot start again. Each fault prints a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any
from unittest.mock import patch

import psutil

from kdrl_mcore.parallel.platform import prepare_platform

prepare_platform()

import torch.distributed as dist  # noqa: E402

from kdrl_mcore.cli import train  # noqa: E402
from kdrl_mcore.rollout.refit.writer import WeightWriter  # noqa: E402
from kdrl_mcore.rollout.vllm import engine as vllm  # noqa: E402
from kdrl_mcore.rollout.vllm.client import EngineServer, Launch, address_path  # noqa: E402
from kdrl_mcore.trainer import Trainer  # noqa: E402

now: dict[str, Any] = {"step": 0, "responses": 0, "generation": False}
ended: list[list[psutil.Process]] = []


def say(line: str) -> None:
    """Print a line in one write: under `python -u`, which torchrun uses, `print` writes twice, and another rank can write in
    between."""
    sys.stderr.write(line + "\n")


def kill(server: EngineServer) -> None:
    """Send SIGKILL to the server alone; its children must end by themselves."""
    process, *_ = family(server)
    os.kill(process.pid, signal.SIGKILL)
    say(f"killed engine {server.index} in step {now['step']}")


def hang(server: EngineServer, *, answers: bool) -> None:
    """Send SIGSTOP to vLLM's processes and, unless it `answers`, to the server."""
    process, *children = family(server)
    for member in children if answers else [process, *children]:
        os.kill(member.pid, signal.SIGSTOP)
    say(f"engine {server.index} hangs in step {now['step']}")


def family(server: EngineServer) -> list[psutil.Process]:
    """The server and vLLM's processes, none of which may exist at the end."""
    process = psutil.Process(json.loads(address_path(server.run_dir, server.index).read_text())["pid"])
    children = [child for child in process.children(recursive=True) if "resource_tracker" not in " ".join(child.cmdline())]
    assert children
    ended.append([process, *children])
    return ended[-1]


def main() -> int:
    """Train, with the faults."""
    train_step, keep, publish = Trainer._train_step, vllm._Work._keep, WeightWriter.publish

    def faulty_step(trainer: Trainer, step: int) -> None:
        now.update(step=step, responses=0, generation=True)
        servers = trainer.job.engine._replicas.servers  # type: ignore[union-attr]
        if step == 2 and dist.get_rank() == 1:
            kill(servers[1])
        if step == 5 and dist.get_rank() == 0:
            servers[0]._launch = Launch(("--model", "/nowhere"))
            kill(servers[0])
        train_step(trainer, step)
        now["generation"] = False

    def faulty_keep(work: Any, response: Any) -> None:
        keep(work, response)
        now["responses"] += 1
        if now["generation"] and now["step"] == 3 and now["responses"] == 2:
            hang(work._engine._replicas.servers[1], answers=True)
            kill(work._engine._replicas.servers[0])

    def faulty_publish(writer: WeightWriter, bucket: Any) -> None:
        if now["step"] == 4 and now["generation"] and not now.get("refit"):
            now["refit"] = True
            (server,) = writer._servers
            if dist.get_rank() == 1:
                kill(server)  # type: ignore[arg-type]
            else:
                hang(server, answers=False)  # type: ignore[arg-type]
        publish(writer, bucket)

    with (
        patch.object(Trainer, "_train_step", faulty_step),
        patch.object(vllm._Work, "_keep", faulty_keep),
        patch.object(WeightWriter, "publish", faulty_publish),
    ):
        code = train.main(sys.argv[1:])
    left = [member.pid for family in ended for member in family if member.is_running() and member.status() != "zombie"]
    say(f"left running: {left}")
    return code


if __name__ == "__main__":
    sys.exit(main())
