"""What a real student holds, beside the plan: live tensor bytes of one update, and the resident set."""

from __future__ import annotations

import gc
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096}
PROMPT = 16


@dataclass
class Measured:
    """Bytes of one rank.

    Attributes:
        stage: its pipeline stage.
        between: live after an update.
        peak: the most that was live during it.
        resident: by how much the process's largest resident set grew from before the student was built.
    """

    stage: int
    between: int
    peak: int
    resident: int


def write_model(folder: Path, **changes: int) -> Path:
    """A random Qwen2 model with an untied head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**{**MODEL, **changes}, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=8192)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def measure_on_rank(overrides: Sequence[str], tokens: int, micro_batches: int) -> Measured:
    """Build the student and update it twice on micro-batches of `tokens` tokens on each context-parallel rank."""
    import torch.distributed as dist

    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.packing import pack
    from kdrl_mcore.parallel.platform import prepare_platform
    from kdrl_mcore.planning.live import LiveBytes

    prepare_platform()
    from kdrl_mcore.student import MicroBatch, Student

    def token_loss(log_probs, entropy, divergence, rows):  # type: ignore[no-untyped-def]
        return -log_probs / tokens, ({}, {})

    resident = _peak_resident()
    with LiveBytes() as live:
        student = Student(load_config(overrides), dist.get_world_size(), vocabulary=MODEL["vocab_size"])
        layout, groups = student.groups.layout, student.groups
        sequence = np.arange(tokens * layout.context) % 1000
        batches = [
            MicroBatch(
                pack(
                    [(0, sequence[:PROMPT], sequence[PROMPT:])],
                    layout.token_alignment,
                    context_rank=groups.context.rank(),
                    context_size=layout.context,
                ),
                token_loss,
            )
            for _ in range(micro_batches)
        ]
        given = live.now
        student.update(batches, lr=1e-4)  # makes the optimizer's state
        gc.collect()
        live.restart_peak()
        student.update(batches, lr=1e-4)
        gc.collect()
        tokens_bytes = sum(
            tensor.untyped_storage().nbytes()
            for batch in batches
            for tensor in (batch.packed.tokens_S, batch.packed.positions_S, batch.packed.rows_T, batch.packed.targets_T)
        )
        assert given > 0
        return Measured(groups.pipeline.rank(), live.now - tokens_bytes, live.peak - tokens_bytes, _peak_resident() - resident)


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
