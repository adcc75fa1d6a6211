"""Score the tokens of a rollout file under a model (and a teacher), in any layout; compare two scored files.

    torchrun --nproc-per-node 2 tools/score.py --model DIR --input R.jsonl --output S.jsonl --tensor-parallel 2
python tools/score.py --input S.jsonl --compare OTHER.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kdrl_mcore.config import CHOICES, Config, ModelConfig
from kdrl_mcore.errors import ConfigError, DataError, KdrlError
from kdrl_mcore.monitoring.gpu_memory import out_of_memory, ran_out
from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform
from kdrl_mcore.rollout.comparison import Comparison, compare_scores
from kdrl_mcore.rollout.files import check_token_ids, read_rollouts, read_scored, write_rollouts
from kdrl_mcore.types import Rollout, TokenFloats

BLOCK = 8
"""Micro-batches of each replica between two steps of the progress bar."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code: 1 where a comparison exceeds `--tolerance`."""
    options = _parser().parse_args(arguments)
    created = False
    try:
        _check(options)
        if options.model is not None:
            prepare_platform()
            created = initialize_distributed(Config().trainer.distributed_timeout_minutes)
            score(options)
        if options.compare is not None and _is_first():
            left = read_scored(options.input if options.model is None else options.output)
            comparisons = compare_scores(left, read_scored(options.compare))
            show(comparisons)
            if options.tolerance is not None and max(each.largest for each in comparisons) > options.tolerance:
                raise KdrlError(f"the largest difference exceeds --tolerance {options.tolerance:g}")
    except KdrlError as error:
        if _is_first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except RuntimeError as error:
        if not ran_out(error):
            raise
        advice = f"lower --micro-tokens (now {options.micro_tokens}), or raise --tensor-parallel or --pipeline-parallel"
        told = out_of_memory(error, "scoring", dist.get_rank(), {}, advice)
        print(f"error: {told}", file=sys.stderr, flush=True)
        return told.exit_code
    finally:
        if created and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.model is None and options.compare is None:
        raise ConfigError("nothing to do: name a model to score with (--model), or a file to compare with (--compare)")
    if options.model is not None and options.output is None:
        raise ConfigError("--model needs --output, the scored file to write")
    if options.compare is not None and not options.compare.is_file():  # said before the scoring, not after
        raise DataError(f"{options.compare} does not exist: name a scored file or a rollout file (JSONL)")
    if options.tolerance is not None and options.compare is None:
        raise ConfigError("--tolerance needs --compare, the file to compare with")
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and name != "tolerance" and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be greater than 0")
    if options.tolerance is not None and options.tolerance < 0:
        raise ConfigError(f"--tolerance {options.tolerance:g} must be at least 0")


def _is_first() -> bool:
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def score(options: argparse.Namespace) -> None:
    """Write `log_probs` and `entropy` of every response token, and with a teacher `teacher_log_probs`. Collective over the
    world: rank 0 writes."""
    # Megatron-Core reads torch.cuda when it is imported, so the platform comes first.
    from kdrl_mcore.data.vocabulary import shared_vocabulary

    rollouts = read_rollouts(options.input)
    _, vocabulary = shared_vocabulary(options.model, options.teacher)
    check_token_ids(options.input, rollouts, vocabulary)
    layout = (options.tensor_parallel, options.pipeline_parallel)
    log_probs, entropies = _score_with(options, options.model, layout, rollouts, vocabulary)
    scores = {"log_probs": log_probs, "entropy": entropies}
    if options.teacher is not None:
        teacher_layout = (options.teacher_tensor_parallel or layout[0], options.teacher_pipeline_parallel or layout[1])
        scores["teacher_log_probs"], _ = _score_with(options, options.teacher, teacher_layout, rollouts, vocabulary)
    if _is_first():
        try:
            write_rollouts(options.output, rollouts, scores)
        except OSError as error:
            raise DataError(f"{options.output} cannot be written ({error.strerror}): choose another --output") from error
        print(f"scored {len(rollouts)} responses: {options.output}")


def _score_with(
    options: argparse.Namespace, path: Path, layout: tuple[int, int], rollouts: list[Rollout], vocabulary: int
) -> tuple[list[TokenFloats], list[TokenFloats]]:
    from kdrl_mcore.convert.load import load_weights
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.model.scoring import score_rollouts
    from kdrl_mcore.parallel.layout import Layout, create_scoring_groups

    groups = create_scoring_groups(Layout(dist.get_world_size(), tensor=layout[0], pipeline=layout[1]))
    model = ModelConfig(dtype=options.dtype)
    parts = build_model(read_architecture(path), model, groups, vocabulary=vocabulary, trainable=False)
    load_weights(parts, path)
    scored: list[tuple[TokenFloats, TokenFloats]] = []
    with Progress(console=Console(stderr=True), disable=not (_is_first() and sys.stderr.isatty())) as progress:
        task = progress.add_task(f"scoring with {path.name}", total=len(rollouts))
        for block in _blocks(rollouts, BLOCK * options.micro_tokens * groups.layout.data):
            scored += score_rollouts(parts, block, temperature=options.temperature, micro_tokens=options.micro_tokens)
            progress.update(task, completed=len(scored))
    return [log_probs for log_probs, _ in scored], [entropy for _, entropy in scored]


def _blocks(rollouts: list[Rollout], tokens: int) -> Iterator[list[Rollout]]:
    """Consecutive rollouts of at most so many tokens (or a single longer one)."""
    block: list[Rollout] = []
    size = 0
    for rollout in rollouts:
        if block and size + rollout.num_tokens > tokens:
            yield block
            block, size = [], 0
        block.append(rollout)
        size += rollout.num_tokens
    yield block


def show(comparisons: list[Comparison]) -> None:
    """Print the largest and the mean difference of each kind of score, and the worst tokens."""
    console = Console()
    table = Table("score", "tokens", "largest", "mean", title="absolute differences, nats")
    for each in comparisons:
        table.add_row(each.name, f"{each.num_tokens:,}", f"{each.largest:.3g}", f"{each.mean:.3g}")
    console.print(table)
    worst = Table("score", "line", "prompt", "token", "id", "left", "right", "difference", title="worst tokens")
    for each in comparisons:
        for token in each.worst:
            worst.add_row(
                each.name,
                str(token.line),
                token.prompt_id,
                str(token.place),
                str(token.token_id),
                f"{token.left:.6f}",
                f"{token.right:.6f}",
                f"{token.size:.3g}",
            )
    console.print(worst)


def _parser() -> argparse.ArgumentParser:
    rollout, batch = Config().rollout, Config().batch
    parser = argparse.ArgumentParser(description="Score the tokens of a rollout file under a model; compare scored files.")
    parser.add_argument("--model", type=Path, help="model directory")
    parser.add_argument("--teacher", type=Path, help="also score with this model, as teacher_log_probs")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
