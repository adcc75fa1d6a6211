"""Load an HF or a converted checkpoint straight into a Megatron model: each rank reads only its own slices."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from kdrl_mcore.convert.adapted import open_weights
from kdrl_mcore.convert.hf_files import unread_files
from kdrl_mcore.convert.parameters import map_chunk
from kdrl_mcore.convert.weight_map import check_names
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.gpt import ModelParts

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_weights(parts: ModelParts, path: str | Path, on_parameter: Callable[[], None] = lambda: None) -> None:
    """Fill this rank's parameters from a model folder, cast to the model's dtype; vocabulary padding becomes zero.

    Args:
        on_parameter: called before each parameter is read.

    Raises:
        ModelError, CheckpointError: a tensor is missing, unexpected or has the wrong shape, or a file is damaged.
    """
    rules = FAMILIES[parts.architecture.family].rules(parts.architecture)
    if dist.get_rank() == 0 and (unread := unread_files(path)):
        logger.warning("%s also holds %s, which %s not read", path, ", ".join(unread), "is" if len(unread) == 1 else "are")
    with open_weights(path) as weights:
        check_names(weights, parts.architecture, rules)
        for chunk in parts.chunks:
            for mapped in map_chunk(chunk, rules, parts.groups):
                on_parameter()
                covered = 0
                for tensor_slice in mapped.slices:
                    source = weights.read(tensor_slice.hf, tensor_slice.hf_start, tensor_slice.length, tensor_slice.dim)
                    mapped.parameter.narrow(tensor_slice.dim, tensor_slice.start, tensor_slice.length).copy_(source)
                    covered += tensor_slice.length
                if mapped.rule.kind == "vocabulary":
                    mapped.parameter[covered:].zero_()


def load_head(path: str | Path, start: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [start, start + columns) of a model's output head [columns, hidden size], independent of the model's own layout.

    Raises:
        ModelError: the model has no such rows, or its files are damaged.
    """
    architecture = read_architecture(path)
    if start + columns > architecture.vocab_size:
        raise ModelError(f"{path} has {architecture.vocab_size} vocabulary rows, fewer than the {start + columns} requested")
    name = "output_layer.weight" if not architecture.tied_embeddings else "embedding.word_embeddings.weight"
    rule = next(rule for rule in FAMILIES[architecture.family].rules(architecture) if rule.megatron == name)
    with open_weights(path) as weights:
        return weights.read(rule.hf[0], start, columns).to(dtype)
