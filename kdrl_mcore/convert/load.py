"""Load an HF or a converted checkpoint straight into a Megatron model: each rank reads its own slices and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kdrl_mcore.convert.folders import open_weights
from kdrl_mcore.convert.parameters import map_chunk
from kdrl_mcore.convert.weight_map import check_names
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.gpt import ModelParts


@torch.no_grad()
def load_weights(parts: ModelParts, path: str | Path, on_parameter: Callable[[], None] = lambda: None) -> None:
    """Fill this rank's parameters from a model folder, casting to the model's dtype; vocabulary padding becomes zero.

    Args:
        on_parameter: called when the next one is begun.

    Raises:
        ModelError, CheckpointError: a missing or unexpected tensor, a wrong shape, or a damaged file.
    """
    rules = FAMILIES[parts.architecture.family].rules(parts.architecture)
    with open_weights(path) as weights:
        check_names(weights, parts.architecture, rules)
        for chunk in parts.chunks:
            for mapped in map_chunk(chunk, rules, parts.groups):
                on_parameter()
                covered = 0
                for piece in mapped.pieces:
                    source = weights.read(piece.hf, piece.hf_start, piece.length, piece.dim)
                    mapped.parameter.narrow(piece.dim, piece.start, piece.length).copy_(source)
                    covered += piece.length
                if mapped.rule.kind == "vocabulary":
                    mapped.parameter[covered:].zero_()


def load_head(path: str | Path, start: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [start, start + columns) of a model's output head [columns, hidden size], whatever layout the model itself has.

    Raises:
        ModelError: the model has no such rows, or its files are damaged.
    """
    architecture = read_architecture(path)
    if start + columns > architecture.vocab_size:
        raise ModelError(f"{path} has {architecture.vocab_size} vocabulary columns, fewer than the {start + columns} asked for")
    name = "output_layer.weight" if not architecture.tied_embeddings else "embedding.word_embeddings.weight"
    rule = next(rule for rule in FAMILIES[architecture.family].rules(architecture) if rule.megatron == name)
    with open_weights(path) as weights:
        return weights.read(rule.hf[0], start, columns).to(dtype)
