"""Score the tokens of a rollout file under a model (and a teacher), in any layout; compare two scored files.

kdrl-score --ranks 2 --model DIR --input R.jsonl --output S.jsonl --tensor-parallel 2
kdrl-score --input S.jsonl --compare OTHER.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kdrl_mcore.cli.program import Options, Program, add_ranks_option, is_first_rank
from kdrl_mcore.config import CHOICES, Config, ModelConfig
from kdrl_mcore.config.derived import TEACHER
from kdrl_mcore.config.keys import RANGES
from kdrl_mcore.config.ranges import NOT_NEGATIVE, check_number
from kdrl_mcore.convert.folders import find_model
from kdrl_mcore.errors import ConfigError, DataError, KdrlError
from kdrl_mcore.monitoring.gpu_memory import gpu_memory_errors
from kdrl_mcore.rollout.comparison import ScoreComparison, compare_scores
from kdrl_mcore.rollout.files import read_rollouts, read_scored, write_rollouts
from kdrl_mcore.types import Rollout, TokenFloats

RANGES_OF = {
    "tensor_parallel": "parallel.tensor",
    "pipeline_parallel": "parallel.pipeline",
    "teacher_tensor_parallel": "teacher.parallel.tensor",
    "teacher_pipeline_parallel": "teacher.parallel.pipeline",
    "temperature": "rollout.temperature",
    "micro_tokens": "batch.micro_tokens",
}
"""The configuration key whose range applies to each option."""
BLOCK = 8
"""Micro-batches per replica between two updates of the progress bar."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code, 1 if a comparison exceeds `--tolerance`."""
    with Program() as program:
        options = _parser().parse_args(arguments)
        _check(options)
        if _scores(options):
            models = {name: find_model(path) for name in ("model", "teacher") if (path := getattr(options, name)) is not None}
            program.join(Config().trainer.distributed_timeout_minutes)
            models = _resolve(models)
            advice = f"lower --micro-tokens (now {options.micro_tokens}), or raise --tensor-parallel or --pipeline-parallel"
            with gpu_memory_errors("scoring", dist.get_rank(), advice):
                score(options, models.get("model"), models.get("teacher"))
        if options.compare is not None and is_first_rank():
            left = read_scored(options.output if _scores(options) else options.input)
            comparisons = compare_scores(left, read_scored(options.compare))
            show(comparisons)
            if options.tolerance is not None and max(each.largest for each in comparisons) > options.tolerance:
                raise KdrlError(f"the largest difference exceeds --tolerance {options.tolerance:g}")
    return program.exit_code


def _resolve(models: Mapping[str, Path]) -> dict[str, Path]:
    """The models' folders, downloaded where they are hub ids. Collective over the world."""
    from kdrl_mcore.data.hub import resolve

    folders, _ = resolve({f"--{name}": str(path) for name, path in models.items()})
    return {name: Path(folders.get(f"--{name}", path)) for name, path in models.items()}


def _scores(options: argparse.Namespace) -> bool:
    return options.model is not None or options.teacher is not None


def _check(options: argparse.Namespace) -> None:
    if not _scores(options) and options.compare is None:
        raise ConfigError(
            "nothing to do: name a model to score with (--model, --teacher), or a file to compare with (--compare)"
        )
    if _scores(options) and options.output is None:
        raise ConfigError(f"--{'teacher' if options.model is None else 'model'} needs --output, the scored file to write")
    for name in ("input", "compare"):
        given = getattr(options, name)
        if _scores(options) and given is not None and given.exists() and options.output.resolve() == given.resolve():
            raise ConfigError(f"--output is also the file of --{name}, whose scores would be lost: name another one")
    if options.compare is not None and not options.compare.is_file():  # checked before the scoring, not after
        raise DataError(f"{options.compare} does not exist: name a scored file or a rollout file (JSONL)")
    if options.tolerance is not None and options.compare is None:
        raise ConfigError("--tolerance needs --compare, the file to compare with")
    for name, key in RANGES_OF.items():
        value = getattr(options, name)
        if value is not None:
            check_number(f"--{name.replace('_', '-')}", value, RANGES[key])
    if options.tolerance is not None:
        check_number("--tolerance", options.tolerance, NOT_NEGATIVE)


def score(options: argparse.Namespace, model: Path | None, teacher: Path | None) -> None:
    """Write `log_probs` and `entropy` of every response token and, with a teacher, `teacher_log_probs`, `teacher_entropy` and
    their record. Collective over the world: rank 0 writes."""
    # Megatron-Core reads torch.cuda when it is imported, so the platform is prepared first.
    from kdrl_mcore.data.limits import Limits, check_rollouts
    from kdrl_mcore.data.vocabulary import shared_vocabulary
    from kdrl_mcore.teacher.recorded import LISTS, RECORD, records_of

    rollouts = read_rollouts(options.input)
    models = [path for path in (model, teacher) if path is not None]
    _, vocab_size = shared_vocabulary(*models)
    limits = Limits.of(vocab_size, models)
    check_rollouts(rollouts, options.input, limits)
    layout = (options.tensor_parallel, options.pipeline_parallel)
    scores, records = {}, {}
    if model is not None:
        scores["log_probs"], scores["entropy"] = _score_with(options, model, layout, rollouts, vocab_size)
    if teacher is not None:
        teacher_layout = (options.teacher_tensor_parallel or layout[0], options.teacher_pipeline_parallel or layout[1])
        read = _as_teacher_reads(options, rollouts)
        check_rollouts(read, options.input, limits)
        found = _score_with(options, teacher, teacher_layout, read, vocab_size)
        scores |= dict(zip(LISTS.values(), found, strict=True))
        records[RECORD] = records_of(read, teacher, options.temperature, vocab_size)
    if is_first_rank():
        try:
            write_rollouts(options.output, rollouts, scores, records)
        except OSError as error:
            raise DataError(f"{options.output} cannot be written ({error.strerror}): choose another --output") from error
        print(f"scored {len(rollouts)} responses: {options.output}")


def _as_teacher_reads(options: argparse.Namespace, rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts after the prompts that `--teacher-prompt` names."""
    if options.teacher_prompt == "student":
        return rollouts
    for line, rollout in enumerate(rollouts, start=1):
        if TEACHER not in rollout.teacher_prompts:
            raise DataError(
                f"{options.input} line {line} has no teacher_prompts.{TEACHER}: name a file of a run with teacher.prompt, or "
                "leave out --teacher-prompt"
            )
    return [rollout.after(rollout.teacher_prompts[TEACHER]) for rollout in rollouts]


def _score_with(
    options: argparse.Namespace, path: Path, layout: tuple[int, int], rollouts: list[Rollout], vocab_size: int
) -> tuple[list[TokenFloats], list[TokenFloats]]:
    from kdrl_mcore.convert.load import load_weights
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.model.scoring import score_rollouts
    from kdrl_mcore.parallel.layout import Layout, create_scoring_groups

    groups = create_scoring_groups(Layout(dist.get_world_size(), tensor=layout[0], pipeline=layout[1]))
    model = ModelConfig(dtype=options.dtype)
    parts = build_model(read_architecture(path), model, groups, vocab_size=vocab_size, trainable=False)
    load_weights(parts, path)
    scored: list[tuple[TokenFloats, TokenFloats]] = []
    with Progress(console=Console(stderr=True), disable=not (is_first_rank() and sys.stderr.isatty())) as progress:
        task = progress.add_task(f"scoring with {path.name}", total=len(rollouts))
        for block in _blocks(rollouts, BLOCK * options.micro_tokens * groups.layout.data):
            scored += score_rollouts(parts, block, temperature=options.temperature, micro_tokens=options.micro_tokens)
            progress.update(task, completed=len(scored))
    return [log_probs for log_probs, _ in scored], [entropy for _, entropy in scored]


def _blocks(rollouts: list[Rollout], tokens: int) -> Iterator[list[Rollout]]:
    """Blocks of consecutive rollouts of at most `tokens` tokens together (or one longer rollout)."""
    block: list[Rollout] = []
    size = 0
    for rollout in rollouts:
        if block and size + rollout.num_tokens > tokens:
            yield block
            block, size = [], 0
        block.append(rollout)
        size += rollout.num_tokens
    yield block


def show(comparisons: list[ScoreComparison]) -> None:
    """Print the largest and mean difference of each kind of score, and the worst tokens."""
    console = Console()
    table = Table("score", "responses", "tokens", "largest", "mean", title="absolute differences, nats")
    for each in comparisons:
        table.add_row(each.name, f"{each.num_responses:,}", f"{each.num_tokens:,}", f"{each.largest:.3g}", f"{each.mean:.3g}")
    console.print(table)
    worst = Table("score", "line", "prompt", "token", "id", "left", "right", "difference", title="worst tokens")
    for each in comparisons:
        for token in each.worst:
            worst.add_row(
                each.name,
                str(token.line),
                token.prompt_id,
                str(token.index),
                str(token.token_id),
                f"{token.left:.6f}",
                f"{token.right:.6f}",
                f"{token.size:.3g}",
            )
    console.print(worst)


def _parser() -> argparse.ArgumentParser:
    rollout, batch = Config().rollout, Config().batch
    parser = Options(prog="kdrl-score", description="Score the tokens of a rollout file under a model; compare scored files.")
    parser.add_argument(
        "--model", type=Path, help="model directory, a training checkpoint, or a run (its hf, or else its latest checkpoint)"
    )
    add_ranks_option(parser)
    parser.add_argument("--teacher", type=Path, help="score with this model (too), as teacher_log_probs")
    parser.add_argument(
        "--teacher-prompt",
        choices=("student", "own"),
        default="student",
        help="the prompts it reads: the student's, or its own from the file's teacher_prompts (default: %(default)s)",
    )
    parser.add_argument("--input", type=Path, required=True, help="rollout file (JSONL), or the scored file to compare")
    parser.add_argument("--output", type=Path, help="scored file to write")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="report the differences to this scored or rollout file")
    parser.add_argument("--tolerance", type=float, help="with --compare: exit with 1 if a difference is larger")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--teacher-tensor-parallel", type=int, help="default: the model's")
    parser.add_argument("--teacher-pipeline-parallel", type=int, help="default: the model's")
    parser.add_argument("--temperature", type=float, default=rollout.temperature, help="default: %(default)s")
    parser.add_argument("--dtype", choices=CHOICES["model.dtype"], default=ModelConfig().dtype, help="default: %(default)s")
    parser.add_argument(
        "--micro-tokens", type=int, default=batch.micro_tokens, help="most tokens in one micro-batch (default: %(default)s)"
    )
    return parser
