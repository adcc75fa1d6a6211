"""All checks and measurements that need a GPU, in one command of at most eight minutes: `make gpu-check`.

    python -m tools.gpu_check [--json FILE] [--seconds N] [--only STAGE ...] [--sizes full|small] [--under MODULE]

Each stage is a separate process with a share of the time, and a failed stage does not keep the others from running. The check
needs one GPU, torch, Triton and the packages that training imports (`tools/gpu_wheels.py`), but no network, vLLM or data sets.
`--under tests.paper_cuda --sizes small` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tools import gpu_stages
from tools.gpu_stages import SIZES, Result, Sizes

STAGES: dict[str, Callable[[Sizes, Path], Result]] = {
    "environment": gpu_stages.environment,
    "tests": gpu_stages.gpu_tests,
    "matrices": gpu_stages.matrices,
    "head": gpu_stages.head,
    "cuda ipc": gpu_stages.cuda_ipc,
    "train": gpu_stages.train,
    "train, off-loads": gpu_stages.train_with_off_loads,
    "train, Transformer Engine": gpu_stages.train_with_transformer_engine,
    "sample": gpu_stages.sample,
}
MOST = {"tests": 0.45}
"""The share of the whole time that each of these stages may take; the others may take all the time that is left."""
MARK = "RESULT "


def main(arguments: list[str]) -> int:
    """Run every stage; returns 1 if one failed, or if there is no GPU."""
    parser = argparse.ArgumentParser(description="Run the checks and measurements that need a GPU on this machine.")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file for the results")
    parser.add_argument("--seconds", type=float, default=450.0, help="time for all stages; those left without time are named")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"run only some of: {', '.join(STAGES)}")
    parser.add_argument("--sizes", choices=sorted(SIZES), default="full", help="sizes of the problems; small for a rehearsal")
    parser.add_argument("--under", metavar="MODULE", help="run each stage through this module, such as tests.paper_cuda")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage is not None:
        print(MARK + json.dumps(STAGES[options.stage](SIZES[options.sizes], options.folder)), flush=True)
        return 0
    if options.under is None and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} of {sys.executable} sees no GPU", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for stage in options.only or STAGES:
            results[stage] = _run(stage, options, Path(folder), deadline)
            print(_line(stage, results[stage]), flush=True)
            _write(options.json, results)
    print(f"results in {options.json}")
    return any("error" in result for result in results.values())


def _run(stage: str, options: argparse.Namespace, folder: Path, deadline: float) -> Result:
    left = deadline - time.monotonic()
    if left < 1:
        return {"error": f"no time was left of --seconds={options.seconds:g}"}
    command = [sys.executable, "-m", *([options.under] if options.under else []), "tools.gpu_check", "--stage", stage]
    command += ["--sizes", options.sizes, "--folder", str(folder)]
    began = time.monotonic()
    try:
        limit = min(left, MOST.get(stage, 1.0) * options.seconds)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {time.monotonic() - began:.0f} s"}
    found = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not found:
        tail = (done.stdout + done.stderr).strip().splitlines()[-25:]
        return {"error": f"exit code {done.returncode}: {tail[-1] if tail else 'no output'}", "output": tail}
    return {**json.loads(found[-1]), "seconds": round(time.monotonic() - began, 1)}


def _line(stage: str, result: Result) -> str:
    shown = {key: value for key, value in result.items() if not isinstance(value, (dict, list))}
    return f"{stage}: " + ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _write(path: Path, results: dict[str, Result]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
