"""Preflight, evaluation and scoring as the ranks of a pool run them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

from tests.reference.tiny_models import read_jsonl
from tests.support.training import Outcome, listen
from tests.support.zoo import Zoo

SAMPLES = 3

BLOCK = 2

REWARD = "reward.kind=tests.support.rewards:LengthModulo"


def evaluate_on_rank(arguments: list[str]) -> Outcome:
    """`tools/evaluate.py`, as the command line calls it, in the pool's world; `found["blocks"]` says how often it sampled."""
    import torch.distributed as dist

    from kdrl_mcore.parallel.platform import destroy_groups, prepare_platform

    prepare_platform()
    from kdrl_mcore.cli.evaluate import main
    from kdrl_mcore.rollout.megatron import MegatronEngine

    kept = set(dist.distributed_c10d._world.pg_map)
    with patch.object(MegatronEngine, "generate", autospec=True, side_effect=MegatronEngine.generate) as generate:
        outcome = listen(lambda: main(arguments))
    destroy_groups(kept)
    outcome.found = {"blocks": generate.call_count}
    return outcome


def evaluation_arguments(folder: Path, output: str, *more: str) -> list[str]:
    files = ["--model", str(folder / "model"), "--data", str(folder / "sums.jsonl"), "--output", str(folder / output)]
    sizes = ["--samples", str(SAMPLES), "--max-response-tokens", "120", "--block", str(BLOCK)]
    return [*files, *sizes, "--temperature", "2.5", *more, "data.template=plain", REWARD]


def score_on_rank(arguments: list[str]) -> Outcome:
    """`tools/score.py`, as the command line calls it, in the pool's world."""
    import torch.distributed as dist

    from kdrl_mcore.parallel.platform import destroy_groups, prepare_platform

    prepare_platform()
    from kdrl_mcore.cli.score import main

    kept = set(dist.distributed_c10d._world.pg_map)
    outcome = listen(lambda: main(arguments))
    destroy_groups(kept)
    return outcome


def assert_scores(path: Path, expected: dict[str, list[torch.Tensor]]) -> None:
    rows = read_jsonl(path)
    for name, truths in expected.items():
        for row, truth in zip(rows, truths, strict=True):
            torch.testing.assert_close(torch.tensor(row[name]).double(), truth, rtol=1e-4, atol=1e-5)


PREFLIGHT_CHECKS = [
    *("versions", "devices", "hub", "models", "layout", "engines", "teachers", "data", "lengths", "memory", "loggers"),
    *("run.dir", "all-reduce"),
]


def preflight_overrides(zoo: Zoo, run: Path) -> list[str]:
    """Overrides of a run that replays rollouts and passes every check."""
    paths = {"run.dir": run, "student.path": zoo.model("untied"), "teacher.path": zoo.model("teacher")}
    return ["rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", *(f"{key}={path}" for key, path in paths.items())]


def findings_on_rank(overrides: list[str], min_bandwidth: float = 0.0) -> list[tuple[str, bool, str]]:
    """Each check's name, whether it passed, and its message."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.config import load_config
    from kdrl_mcore.preflight.checks import run_checks

    findings = run_checks(load_config(overrides), min_bandwidth)
    return [(finding.name, finding.good, finding.text) for finding in findings]
