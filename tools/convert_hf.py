"""Convert checkpoints: `python tools/convert_hf.py export --checkpoint CKPT --output HF_DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdrl_mcore.config import ModelConfig
from kdrl_mcore.errors import CheckpointError, KdrlError
from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

SUFFIXES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: list[str]) -> int:
    """Run a sub-command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert checkpoints between Megatron's format and Hugging Face's.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a training checkpoint as an HF checkpoint")
    export.add_argument("--checkpoint", type=Path, required=True, help="a training checkpoint (RUN/checkpoints/step_NNNNNN)")
    export.add_argument("--output", type=Path, required=True, help="the HF directory to write")
    export.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the exported weights")
    export.add_argument("--max-shard-size", type=_size, default="5GB", help="largest file, such as 5GB (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        export_checkpoint(options.checkpoint, options.output, options.dtype, options.max_shard_size)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.output}")
    return 0


def export_checkpoint(checkpoint: Path, output: Path, dtype: str, max_shard_bytes: int) -> None:
    """Load a training checkpoint's weights on this one process and write them as an HF checkpoint."""
    prepare_platform()
    initialize_distributed(timeout_minutes=30)
    # Megatron-Core reads torch.cuda when it is imported, so the platform comes first.
    from kdrl_mcore.checkpointing.checkpoint import MODEL_DIR, load_weights
    from kdrl_mcore.convert.export import export_hf
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.parallel.layout import Layout, create_student_groups

    if not (checkpoint / MODEL_DIR).is_dir():
        raise CheckpointError(f"{checkpoint} is not a training checkpoint: it has no {MODEL_DIR}/ folder")
    architecture = read_architecture(checkpoint / MODEL_DIR)
    groups = create_student_groups(Layout(world=1))
    parts = build_model(architecture, ModelConfig(dtype=dtype), groups, vocabulary=architecture.vocab_size, trainable=False)
    load_weights(checkpoint, parts)
    export_hf(parts, checkpoint / MODEL_DIR, output, max_shard_bytes)


def _size(text: str) -> int:
    number, suffix = text[:-2], text[-2:].upper()
    if suffix not in SUFFIXES or not number.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 500MB or 5GB")
    return int(number) * SUFFIXES[suffix]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
