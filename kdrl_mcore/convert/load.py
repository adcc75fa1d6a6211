"""Load an HF checkpoint straight into a Megatron model: each rank reads its own slices and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from kdrl_mcore.convert.hf_files import HFWeights
from kdrl_mcore.convert.weight_map import hf_shapes, map_chunk
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.gpt import ModelParts


@torch.no_grad()
def load_hf_weights(parts: ModelParts, path: str | Path) -> None:
    """Fill this rank's parameters from an HF directory, casting to the model's dtype; vocabulary padding becomes zero.

    Raises:
        ModelError: a missing or unexpected tensor, a wrong shape, or a damaged file.
    """
    architecture, tensor = parts.architecture, parts.groups.tensor
    rules = FAMILIES[architecture.family].rules(architecture)
    with HFWeights(path) as weights:
        _check_names(weights, rules, architecture.num_layers, architecture.tied_embeddings)
        for chunk in parts.chunks:
            for mapped in map_chunk(chunk, rules, tensor.rank(), tensor.size()):
                for name, shape in zip(mapped.hf_names, hf_shapes(mapped.rule, architecture), strict=True):
                    if weights.shape(name) != shape:
                        raise ModelError(
                            f"{weights.path}: {name} has shape {weights.shape(name)}, its config.json says {shape}"
                        )
                covered = 0
                for piece in mapped.pieces:
                    source = weights.read(piece.hf, piece.hf_start, piece.length, piece.dim)
                    mapped.parameter.narrow(piece.dim, piece.start, piece.length).copy_(source)
                    covered += piece.length
                if mapped.rule.kind == "vocabulary":
                    mapped.parameter[covered:].zero_()


def _check_names(weights: HFWeights, rules: list, num_layers: int, tied: bool) -> None:
    expected = {name.format(layer=layer) for rule in rules for name in rule.hf for layer in range(num_layers)}
    unexpected = sorted(set(weights.file_of) - expected - ({"lm_head.weight"} if tied else set()))
    # Buffers that old exports stored; they are computed, not learned.
    unexpected = [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise ModelError(f"{weights.path} has a tensor its architecture does not: {unexpected[0]} ({len(unexpected)} such)")


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
    with HFWeights(path) as weights:
        return weights.read(rule.hf[0], start, columns, 0).to(dtype)
