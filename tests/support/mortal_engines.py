"""A training run whose vLLM engines are killed every few steps, at moments drawn from a seed.

python -m tests.support.mortal_engines SEED OVERRIDE...
"""

from __future__ import annotations

import sys
import threading
from typing import Any
from unittest.mock import patch

import numpy as np

EVERY = 3  # steps


def main(seed: int, overrides: list[str]) -> int:
    from kdrl_mcore.cli.train import main as train
    from kdrl_mcore.rollout.source import SampledRollouts
    from kdrl_mcore.rollout.vllm.client import kill_group

    random, original = np.random.default_rng(seed), SampledRollouts.rollouts

    def rollouts(self: Any, step: int, *args: Any) -> Any:
        if step % EVERY == 0:
            servers = self.engine._replicas.servers
            server, delay = servers[int(random.integers(len(servers)))], float(random.uniform(0, 1.5))

            def kill() -> None:
                if server.pid is not None:
                    print(f"killed engine {server.index}, {delay:.2f} s after step {step} began to wait", file=sys.stderr)
                    kill_group(server.pid)

            threading.Timer(delay, kill).start()
        return original(self, step, *args)

    with patch.object(SampledRollouts, "rollouts", rollouts):
        return train(overrides)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
