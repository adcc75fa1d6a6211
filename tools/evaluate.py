"""Evaluate a model: avg@k with its interval, pass@k, maj@k, greedy, response length and the share cut off, as in training.

    torchrun --nproc-per-node 2 tools/evaluate.py --model DIR --data FILE --samples 16 --tensor-parallel 2
    python tools/evaluate.py --model DIR --benchmarks aime24,math_500 --samples 16 --temperature 0.6 --top-p 0.95 \\
        --max-response-tokens 32768 prompt=r1_distill

The model is an HF or a converted checkpoint; the data are a JSONL or parquet file, a hub id, or benchmarks of conf/benchmark.
Any key of the training configuration may follow as KEY=VALUE (`data.prompt_key=question`, `reward=exact_match`). Responses are
kept as rollout files in `--output`; the same command goes on from the last finished block of prompts after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kdrl_mcore.config import CHOICES, Config, load_config
from kdrl_mcore.errors import ConfigError, DataError, KdrlError
from kdrl_mcore.monitoring.gpu_memory import key_to_lower, out_of_memory, ran_out
from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

BLOCK = 32
"""Prompts sampled in one go: what an interruption loses at most."""
METRICS_FILE = "metrics.json"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    created = False
    try:
        output = options.output or Path("runs/evaluation") / Path(options.model).resolve().name
        config = load_config([f"run.dir='{output}'", *_overrides(options), *options.overrides])
        if not config.data.eval and not config.eval.benchmarks:
            raise ConfigError("nothing to evaluate on: name --data FILE or --benchmarks NAME")
        if config.rollout.engine == "replay":
            raise ConfigError("rollout.engine=replay samples nothing: leave it out, or use rollout=vllm")
        prepare_platform(config.trainer.deterministic)
        created = initialize_distributed(config.trainer.distributed_timeout_minutes)
        evaluate(config, output)
    except OSError as error:
        return _fail(DataError(f"{error.filename or options.output}: {error.strerror or error}"))
    except KdrlError as error:
        return _fail(error)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        advice = key_to_lower(config, "evaluation") + ", or raise parallel.tensor"
        told = out_of_memory(error, "evaluation", dist.get_rank(), {}, advice)
        print(f"error: {told}", file=sys.stderr, flush=True)  # on whichever rank it was
        return told.exit_code
    finally:
        if created and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _fail(error: KdrlError) -> int:
    if _is_first():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _is_first() -> bool:
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def evaluate(config: Config, output: Path) -> None:
    """Write the responses and `metrics.json` to `output` and print the table. Collective over the world: rank 0 writes."""
    # Megatron-Core reads torch.cuda when it is imported, so the platform comes first.
    from kdrl_mcore.convert.load import load_weights
    from kdrl_mcore.data.vocabulary import shared_vocabulary
    from kdrl_mcore.evaluation.evaluate import Evaluation, summarize
    from kdrl_mcore.evaluation.generations import Generations
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.parallel.layout import Layout, create_scoring_groups
    from kdrl_mcore.rollout.engine import RolloutEngine
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.rollout.vllm import VllmEngine
    from kdrl_mcore.rollout.vllm_placement import start_replicas

    model, parallel = str(config.student.path), config.parallel
    tokenizer, vocabulary = shared_vocabulary(model)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer.json, which sampling needs")
    layout = Layout(dist.get_world_size(), tensor=parallel.tensor, pipeline=parallel.pipeline, expert=parallel.expert)
    groups = create_scoring_groups(layout)
    evaluation = Evaluation(config, tokenizer, groups)
    engine: RolloutEngine | None = None
    try:
        generations = Generations(output, _identity(config)) if _is_first() else None
        parts = build_model(read_architecture(model), config.model, groups, vocabulary=vocabulary, trainable=False)
        load_weights(parts, model)
        if config.rollout.engine == "vllm":
            engine = VllmEngine(start_replicas(config, vocabulary), config.rollout, tokenizer, None)
        else:
            engine = MegatronEngine(parts, tokenizer, config.rollout.max_sequences, lambda: 0)
        engine.refit(_Evaluated(parts))
        with Progress(console=Console(stderr=True), disable=not (_is_first() and sys.stderr.isatty())) as progress:
            task = progress.add_task("evaluating", total=evaluation.num_responses)
            results = evaluation.run(
                engine, generations, lambda name, count: progress.update(task, advance=count, description=name)
            )
    finally:
        evaluation.close()
        if engine is not None:
            engine.close()
    if _is_first():
        metrics = summarize(results)
        aside = output / f".{METRICS_FILE}.tmp"
        aside.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        aside.replace(output / METRICS_FILE)
        show({result.name: result.num_prompts for result in results}, metrics)
        print(f"responses and {METRICS_FILE}: {output}")


@dataclass
class _Evaluated:
    """The model, as an engine takes it."""

    parts: Any
    version: int = 0

    def wait_for_weights(self) -> None:
        """They are there."""


def _identity(config: Config) -> dict[str, Any]:
    """What the responses depend on: an evaluation goes on only where all of it is the same."""
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
        "rollout": {key: settings["rollout"][key] for key in ("engine", "max_response_tokens", "top_p")},
    }


def show(num_prompts: dict[str, int], metrics: dict[str, float]) -> None:
    """Print the numbers of each benchmark in a column, and the means over benchmarks in the last."""
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
    "temperature": "eval.temperature",
    "top_p": "rollout.top_p",
    "max_response_tokens": "rollout.max_response_tokens",
    "max_sequences": "rollout.max_sequences",
    "tensor_parallel": "parallel.tensor",
    "pipeline_parallel": "parallel.pipeline",
    "dtype": "model.dtype",
    "seed": "trainer.seed",
    "block": "eval.block",
}
"""The configuration's key behind each option."""


def _overrides(options: argparse.Namespace) -> list[str]:
    values = {key: getattr(options, name) for name, key in KEYS.items() if getattr(options, name) is not None}
    quoted = {key: "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'" for key, value in values.items()}
    typed = {key: quoted[key] if isinstance(value, str) else value for key, value in values.items()}
    return [
        "objective=grpo",  # none of its settings matter here, but it wants no teacher
        f"eval.greedy={str(options.greedy).lower()}",
        f"eval.benchmarks=[{options.benchmarks}]",
        *(f"{key}={value}" for key, value in typed.items()),
    ]


def _parser() -> argparse.ArgumentParser:
    config = Config()
    parser = argparse.ArgumentParser(
        description="Evaluate a model: avg@k with its 95 % interval, pass@k, maj@k, greedy, response length, share cut off.",
        epilog="Any key of the training configuration may follow as KEY=VALUE; docs/evaluation.md explains the numbers.",
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", help="JSONL or parquet file with prompt and answer, or a hub id")
    parser.add_argument("--benchmarks", default="", metavar="NAME,NAME", help="of conf/benchmark, such as aime24,math_500")
    parser.add_argument("--samples", type=int, default=config.eval.samples, help="responses per prompt (default: %(default)s)")
    parser.add_argument(
        "--greedy", action=argparse.BooleanOptionalAction, default=config.eval.greedy, help="also one greedy response"
    )
    parser.add_argument("--temperature", type=float, default=config.eval.temperature, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=config.rollout.top_p, help="default: %(default)s")
    parser.add_argument(
        "--max-response-tokens", type=int, default=config.rollout.max_response_tokens, help="default: %(default)s"
    )
    parser.add_argument("--max-sequences", type=int, help="responses that one replica decodes at once")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--dtype", choices=CHOICES["model.dtype"], default=config.model.dtype, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=config.trainer.seed, help="of the sampled responses (default: %(default)s)")
    parser.add_argument("--block", type=int, default=BLOCK, help="prompts sampled in one go (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of responses and metrics (default: runs/evaluation/MODEL)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the training configuration")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
