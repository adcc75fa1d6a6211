"""`python tools/bench.py peers`: a step of this trainer, of TRL's GRPOTrainer and of a plain PyTorch loop, on the same model,
prompts and lengths, one after the other."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

from rich.console import Console
from rich.table import Table

from benchmarks.help import Defaults
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.monitoring.metrics import read_metrics
from kdrl_mcore.resilience.files import write_file
from kdrl_mcore.types import Rollout

ROOT = Path(__file__).resolve().parent.parent
TRL = "1.16.0"
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
"""Installed together with TRL, in the versions of this environment."""
BETA = 0.002
PHASES = ("generation", "teacher", "train")
SHARED = "this trainer, prompts shared"
PEERS = ("this trainer", SHARED, "TRL", "TRL, 4 micro-batches", "plain PyTorch")


@dataclass(frozen=True)
class Work:
    """What every peer does in a step.

    Attributes:
        student, teacher: HF folders; without a teacher the step is GRPO's, otherwise GRPO's with a KL term to the teacher.
        prompts, responses, tokens: prompts of a step, responses to each, and tokens of every response.
        steps: measured steps, after one to warm up.
    """

    student: str
    teacher: str | None
    prompts: int
    responses: int
    tokens: int
    steps: int
    dtype: str
    threads: int


@dataclass(frozen=True)
class Measured:
    """A peer's measured steps.

    Attributes:
        step: seconds of each step.
        phases: seconds of generation, teacher and training of each step, if the peer reports them.
        peak_bytes: the largest resident set of its process.
    """

    peer: str
    step: list[float]
    peak_bytes: int
    phases: dict[str, list[float]] = field(default_factory=dict)


def reward(rollout: Rollout) -> float:
    """Half of all responses are rewarded, by their text: the same work for every peer, and gradients that are not zero."""
    return float(crc32(rollout.response.encode()) % 2)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "peers",
        help="a step compared with TRL and a plain PyTorch loop",
        description="Whole GRPO steps (with --teacher: with a KL term to the teacher) of this trainer, of TRL and "
        "of a plain loop with transformers, each in a separate process, one after the other, on CPU. A copy of the student "
        "whose stop token is never sampled makes all responses equally long. "
        f"TRL {TRL} is installed in a separate environment.",
        formatter_class=Defaults,
    )
    parser.add_argument("--student", required=True, help="HF folder of the model that is trained")
    parser.add_argument("--teacher", help="HF folder of a teacher with the same vocabulary")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--responses", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of every response")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each peer, after one to warm up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="type of the weights")
    parser.add_argument("--micro-tokens", type=int, default=1024, help="this trainer's batch.micro_tokens")
    parser.add_argument(
        "--environment", type=Path, default=Path("runs/bench/peers"), help="environment in which TRL is, or will be, installed"
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="the peers to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file")


def run(options: argparse.Namespace) -> None:
    """Measure every peer in turn.

    Raises:
        ConfigError: an option is wrong.
        KdrlError: a peer could not be installed, or failed.
    """
    for name in ("prompts", "responses", "tokens", "steps", "threads"):
        if getattr(options, name) < (2 if name == "responses" else 1):
            raise ConfigError(f"--{name} is {getattr(options, name)}: too small")
    console, measured = Console(width=None if sys.stdout.isatty() else 120), []
    with console.status("") as status, tempfile.TemporaryDirectory(prefix="kdrl_bench_") as name:
        folder = Path(name)
        student = endless(Path(options.student), folder / "student")
        work = Work(
            str(student),
            None if options.teacher is None else str(Path(options.teacher).resolve()),
            *(options.prompts, options.responses, options.tokens, options.steps, options.dtype, options.threads),
        )
        write_file(folder / "work.json", json.dumps(asdict(work)))
        rows = [{"prompt": f"What is {n} + {3 * n + 4}? Think step by step.", "answer": str(4 * n + 4)} for n in range(64)]
        write_file(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        python = install(options.environment, status.update) if any(peer.startswith("TRL") for peer in options.peers) else ""
        programs: dict[str, Callable[[], Measured]] = {
            "this trainer": partial(_this_trainer, "this trainer", work, folder, options.micro_tokens),
            SHARED: partial(_this_trainer, SHARED, work, folder, options.micro_tokens),
            "TRL": partial(_script, "TRL", [python, str(ROOT / "benchmarks/peers_trl.py"), str(folder), "1"], work),
            "TRL, 4 micro-batches": partial(
                _script, "TRL, 4 micro-batches", [python, str(ROOT / "benchmarks/peers_trl.py"), str(folder), "4"], work
            ),
            "plain PyTorch": partial(
                _script, "plain PyTorch", [sys.executable, str(ROOT / "benchmarks/peers_plain.py"), str(folder)], work
            ),
        }
        for peer in options.peers:
            status.update(f"{peer}: {1 + work.steps} steps")
            measured.append(programs[peer]())
            if options.json is not None:
                write_file(options.json, json.dumps([asdict(one) for one in measured], indent=1) + "\n")
    console.print(table(work, measured))


def endless(source: Path, target: Path) -> Path:
    """A copy of a model's folder (large files as links) whose stop token the model never samples.

    Raises:
        ConfigError: the folder has no tokenizer, or its tokenizer has no special token to spare.
    """
    from transformers import AutoTokenizer

    if not (source / "config.json").is_file():
        raise ConfigError(f"--student: {source} is not an HF folder")
    tokenizer = AutoTokenizer.from_pretrained(source)
    used = (tokenizer.chat_template or "") + str([tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token])
    spare = [(number, str(token)) for number, token in tokenizer.added_tokens_decoder.items() if str(token) not in used]
    if not spare:
        raise ConfigError(f"--student: the tokenizer of {source} has no special token that its chat template does not use")
    number, token = spare[-1]
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors" or path.name == "tokenizer.json":
            (target / path.name).symlink_to(path.resolve())
        elif path.suffix == ".jinja":  # the token that ends a turn in the template ends a response, too
            (target / path.name).write_text(path.read_text().replace(tokenizer.eos_token, token))
        elif path.suffix == ".json":
            shutil.copy(path, target)
    for name, key, value in (
        ("config.json", "eos_token_id", number),
        ("generation_config.json", "eos_token_id", number),
        ("tokenizer_config.json", "eos_token", token),
    ):
        content = json.loads((target / name).read_text()) if (target / name).is_file() else {}
        (target / name).write_text(json.dumps({**content, key: value}))
    return target


def install(folder: Path, announce: Callable[[str], None]) -> str:
    """Make TRL's environment, unless it exists; returns its Python.

    Raises:
        KdrlError: pip failed.
    """
    from importlib.metadata import version

    python = folder / "bin" / "python"
    if subprocess.run([str(python), "-c", "import trl"], capture_output=True).returncode if python.exists() else True:
        announce(f"installing TRL {TRL} in {folder} (minutes)")
        venv.create(folder, with_pip=True, clear=True)
        wanted = [f"trl=={TRL}", *(f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES)]
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
        if done.returncode:
            raise KdrlError(f"TRL could not be installed in {folder}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return str(python.absolute())


def _this_trainer(peer: str, work: Work, folder: Path, micro_tokens: int) -> Measured:
    run = folder / peer.replace(" ", "_").replace(",", "")
    overrides = [
        *(f"student.path={work.student}", f"teacher.path={work.teacher or 'null'}"),
        *(("objective=kdrl", f"objective.beta.init={BETA}") if work.teacher else ("objective=grpo",)),
        *("reward.kind=benchmarks.peers:reward", f"data.train={folder}/train.jsonl", "data.eval=null", "rollout=megatron"),
        *(f"rollout.prompts_per_step={work.prompts}", f"rollout.responses_per_prompt={work.responses}"),
        *(f"rollout.max_response_tokens={work.tokens}", f"batch.micro_tokens={micro_tokens}", f"model.dtype={work.dtype}"),
        f"batch.share_prompts={str(peer == SHARED).lower()}",
        *(f"trainer.steps={1 + work.steps}", "trainer.self_test=false", f"run.dir={run}", "checkpoint.every=-1"),
        *("checkpoint.export_hf=false", "logging.progress=false", "logging.tensorboard=false", "eval.every=-1"),
    ]
    peak = _run([sys.executable, "-m", "kdrl_mcore.train", *overrides], work)[1]
    rows = [row for row in read_metrics(run) if row["step"] > 1]
    names = {"generation": "time/rollout", "teacher": "time/teacher", "train": "time/train"}
    phases = {phase: [row[name] for row in rows] for phase, name in names.items()}
    return Measured(peer, [row["time/step"] for row in rows], peak, phases)


def _script(peer: str, command: list[str], work: Work) -> Measured:
    """Run a peer's script, whose last line is a JSON object of lists: `step` and phases."""
    output, peak = _run(command, work)
    times: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return Measured(peer, times.pop("step")[1:], peak, {phase: values[1:] for phase, values in times.items()})


def _run(command: list[str], work: Work) -> tuple[str, int]:
    """The output of a process, and its peak resident set in bytes.

    Raises:
        KdrlError: it failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(work.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise KdrlError(f"{command[1]} failed: {(errors.read().strip().splitlines() or ['no message'])[-1]}")
        output.seek(0)
        return output.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(work: Work, measured: list[Measured]) -> Table:
    """Medians over the measured steps, and ratios to the first peer that is not this trainer."""
    kind = "GRPO + KL to a teacher" if work.teacher else "GRPO"
    title = f"{kind}: {work.prompts} x {work.responses} responses of {work.tokens} tokens, {work.dtype}, {work.threads} threads"
    result = Table(title=title, title_justify="left")
    base = next((one for one in measured if not one.peer.startswith("this trainer")), measured[0])
    for name in ("", "s/step", f"/ {base.peer}", *PHASES, "peak memory", f"/ {base.peer}"):
        result.add_column(name, justify="right" if name else "left")
    for one in measured:
        phases = [f"{median(one.phases[name]):.1f}" if one.phases.get(name) else "-" for name in PHASES]
        result.add_row(
            one.peer,
            f"{median(one.step):.1f}",
            f"{median(one.step) / median(base.step):.2f}",
            *phases,
            f"{one.peak_bytes / 1e9:.1f} GB",
            f"{one.peak_bytes / base.peak_bytes:.2f}",
        )
    return result
