"""Evaluate a model as in training: avg@k with its interval, pass@k, maj@k, greedy, response length, share of cut-off responses.

    kdrl-evaluate --ranks 2 --model DIR --data FILE --samples 16 --tensor-parallel 2
    kdrl-evaluate --model DIR --benchmarks aime24,math_500 --samples 16 --temperature 0.6 --top-p 0.95 \\
        --max-response-tokens 32768 prompt=r1_distill

The model is an HF, a converted or a training checkpoint, or a run; the data are a JSONL or parquet file, a hub id, or
benchmarks of conf/benchmark. Any key of the training configuration may follow as KEY=VALUE (`data.prompt_key=question`,
`reward=exact_match`). Responses are kept as rollout files in `--output`; after an interruption, the same command continues
after the last finished block of prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kdrl_mcore.cli.program import Options, Program, add_ranks_option, is_first_rank
from kdrl_mcore.config import CHOICES, Config, add_config_options, config_arguments, load_config, override
from kdrl_mcore.convert.folders import find_model
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.monitoring.gpu_memory import gpu_memory_errors, key_to_lower

BLOCK = 32
"""Prompts sampled at a time: the most that an interruption loses."""
METRICS_FILE = "metrics.json"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    with Program() as program:
        options = _parser().parse_intermixed_args(arguments)
        model = str(find_model(options.model))
        if Path(model) != Path(options.model) and is_first_rank():
            print(f"evaluating {model}", file=sys.stderr)
        output = options.output or Path("runs/evaluation") / output_name(Path(model).resolve())
        config = load_config([override("run.dir", str(output)), *_overrides(options, model), *config_arguments(options)])
        if not (config.data.eval or config.eval.benchmarks or any(source.eval for source in config.data.sources)):
            raise ConfigError("nothing to evaluate on: name --data FILE or --benchmarks NAME")
        if config.rollout.engine == "replay":
            raise ConfigError("rollout.engine=replay samples nothing: leave it out, or use rollout=vllm")
        program.join(config.trainer.distributed_timeout_minutes, deterministic=config.trainer.deterministic)
        from kdrl_mcore.data.hub import resolve_models  # reads torch.cuda, so the platform is prepared first

        advice = key_to_lower(config, "evaluation") + ", or raise parallel.tensor"
        config, _ = resolve_models(config)
        with gpu_memory_errors("evaluation", dist.get_rank(), advice), _file_errors(output):
            evaluate(config, output)
    return program.exit_code


@contextmanager
def _file_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or output}: {error.strerror or error}") from error


def output_name(model: Path) -> str:
    """A unique folder name for a model: the end of its path, and a digest of the whole path."""
    return "-".join([*model.parts[-2:], hashlib.sha256(str(model).encode()).hexdigest()[:8]])


def evaluate(config: Config, output: Path) -> None:
    """Write the responses and `metrics.json` to `output` and print the table. Collective over the world: rank 0 writes."""
    # Megatron-Core reads torch.cuda when it is imported, so the platform is prepared first.
    from kdrl_mcore.convert.load import load_weights
    from kdrl_mcore.data.limits import Limits
    from kdrl_mcore.data.vocabulary import shared_vocabulary
    from kdrl_mcore.evaluation.evaluate import Evaluation, summarize
    from kdrl_mcore.evaluation.generations import Generations
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.parallel.layout import Layout, create_scoring_groups
    from kdrl_mcore.resilience.files import write_file
    from kdrl_mcore.rollout.engine import RolloutEngine
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.rollout.vllm.engine import VllmEngine
    from kdrl_mcore.rollout.vllm.placement import start_replicas

    model, parallel = str(config.student.path), config.parallel
    architecture = read_architecture(model)
    tokenizer, vocab_size = shared_vocabulary(model)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer.json, which sampling needs")
    layout = Layout(dist.get_world_size(), tensor=parallel.tensor, pipeline=parallel.pipeline, expert=parallel.expert)
    groups = create_scoring_groups(layout)
    evaluation = Evaluation(config, tokenizer, groups, Limits.of(architecture.vocab_size, [model]))
    engine: RolloutEngine | None = None
    try:
        generations = Generations(output, _identity(config)) if is_first_rank() else None
        parts = build_model(architecture, config.model, groups, vocab_size=vocab_size, trainable=False)
        load_weights(parts, model)
        if config.rollout.engine == "vllm":
            replicas = start_replicas(config, vocab_size)
            engine = VllmEngine(replicas, config.rollout, tokenizer, None, vocab_size=vocab_size)
        else:
            engine = MegatronEngine(parts, tokenizer, config.rollout.max_sequences, lambda: 0)
        engine.refit(_Evaluated(parts))
        with Progress(console=Console(stderr=True), disable=not (is_first_rank() and sys.stderr.isatty())) as progress:
            task = progress.add_task("evaluating", total=evaluation.num_responses)
            results = evaluation.run(
                engine, generations, lambda name, count: progress.update(task, advance=count, description=name)
            )
    finally:
        evaluation.close()
        if engine is not None:
            engine.close()
    if is_first_rank():
        metrics = summarize(results)
        write_file(output / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
        show({result.name: result.num_prompts for result in results}, metrics)
        print(f"responses and {METRICS_FILE}: {output}")


@dataclass
class _Evaluated:
    """The evaluated model, in the form that an engine's `refit` expects."""

    parts: Any
    version: int = 0

    def wait_for_weights(self) -> None:
        """Nothing to wait for: the weights are complete."""


def _identity(config: Config) -> dict[str, Any]:
    """All settings on which the responses depend; an evaluation is continued only if they are the same."""
    model = Path(str(config.student.path)).resolve()
    files = sorted(path for path in model.rglob("*") if path.is_file())
    cadence = ("every", "at_start", "benchmarks")
    settings = asdict(config)
    return {
        "model": {str(path.relative_to(model)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "dtype": config.model.dtype,
        "seed": config.trainer.seed,
        "data": settings["data"],
        "reward": settings["reward"],
        "eval": {key: value for key, value in settings["eval"].items() if key not in cadence},
        "rollout": {
            key: settings["rollout"][key] for key in ("engine", "max_response_tokens", "top_p", "top_k", "min_p", "stop")
        },
    }


def show(num_prompts: dict[str, int], metrics: dict[str, float]) -> None:
    """Print a column of numbers for each benchmark, and a last one with the means over benchmarks."""
    first = next(iter(num_prompts))
    own = [name.removeprefix(f"eval/{first}/") for name in metrics if name.startswith(f"eval/{first}/")]
    overall = {own[0]: "accuracy", "greedy": "greedy_accuracy"}
    table = Table("", *num_prompts, *(["mean"] if len(num_prompts) > 1 else []))
    table.add_row("prompts", *map(str, num_prompts.values()))
    for measure in [name for name in own if not name.endswith(("_stderr", "_low", "_high"))]:
        cells = [_cell(f"eval/{name}/{measure}", metrics) for name in num_prompts]
        table.add_row(measure, *cells, *([_cell(f"eval/{overall.get(measure, measure)}", metrics)] if len(cells) > 1 else []))
    Console().print(table)


def _cell(name: str, metrics: dict[str, float]) -> str:
    if name not in metrics:
        return "-"
    if name.endswith("response_length"):
        return f"{metrics[name]:.1f}"
    if f"{name}_low" not in metrics:
        return f"{metrics[name]:.1%}"
    return f"{metrics[name]:.1%} [{metrics[f'{name}_low']:.1%}, {metrics[f'{name}_high']:.1%}]"


KEYS = {
    "model": "student.path",
    "data": "data.eval",
    "samples": "eval.samples",
    "greedy": "eval.greedy",
    "temperature": "eval.temperature",
    "top_p": "eval.top_p",
    "max_response_tokens": "eval.max_response_tokens",
    "max_sequences": "rollout.max_sequences",
    "tensor_parallel": "parallel.tensor",
    "pipeline_parallel": "parallel.pipeline",
    "dtype": "model.dtype",
    "seed": "trainer.seed",
    "block": "eval.block",
}
"""The configuration key that each option sets."""


def _overrides(options: argparse.Namespace, model: str) -> list[str]:
    values = {key: getattr(options, name) for name, key in KEYS.items() if getattr(options, name) is not None}
    values["student.path"] = model
    return [
        "objective=grpo",  # none of its settings matter here, but it needs no teacher
        *([f"eval.benchmarks=[{options.benchmarks}]"] if options.benchmarks is not None else []),
        *(override(key, value) if isinstance(value, str) else f"{key}={value}" for key, value in values.items()),
    ]


def _parser() -> argparse.ArgumentParser:
    config = Config()
    parser = Options(
        prog="kdrl-evaluate",
        description="Evaluate a model: avg@k with its 95 % interval, pass@k, maj@k, greedy, response length, share cut off.",
        epilog="Any key of the training configuration may follow as KEY=VALUE, and the options take precedence over the "
        "file of --config; docs/evaluation.md explains the numbers.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="model directory, a training checkpoint, or a run (its hf, or else its latest checkpoint)",
    )
    add_ranks_option(parser)
    parser.add_argument("--data", help="JSONL or parquet file with prompt and answer, or a hub id")
    parser.add_argument("--benchmarks", metavar="NAME,NAME", help="of conf/benchmark, such as aime24,math_500")
    parser.add_argument("--samples", type=int, help=f"responses per prompt (default: {config.eval.samples})")
    parser.add_argument("--greedy", action=argparse.BooleanOptionalAction, help="also one greedy response (default: yes)")
    parser.add_argument("--temperature", type=float, help=f"default: {config.eval.temperature}")
    parser.add_argument("--top-p", type=float, help=f"default: {config.rollout.top_p}")
    parser.add_argument("--max-response-tokens", type=int, help=f"default: {config.rollout.max_response_tokens}")
    parser.add_argument("--max-sequences", type=int, help="responses that one replica decodes at once")
    parser.add_argument("--tensor-parallel", type=int, help=f"default: {config.parallel.tensor}")
    parser.add_argument("--pipeline-parallel", type=int, help=f"default: {config.parallel.pipeline}")
    parser.add_argument("--dtype", choices=CHOICES["model.dtype"], help=f"default: {config.model.dtype}")
    parser.add_argument("--seed", type=int, help=f"of the sampled responses (default: {config.trainer.seed})")
    parser.add_argument("--block", type=int, default=BLOCK, help="prompts sampled at a time (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of responses and metrics (default: a separate folder for each model in runs/evaluation)",
    )
    add_config_options(parser, "KEY=VALUE")
    return parser
