"""One rank of a server of `kdrl-serve-teacher --kind hidden_states`, which starts them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from kdrl_mcore.cli.commands import end_with_launcher
from kdrl_mcore.cli.program import Program
from kdrl_mcore.config import ModelConfig
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.errors import ConfigError

TIMEOUT_MINUTES = 30


def main(arguments: list[str]) -> int:
    """Serve until asked to stop; returns the exit code."""
    from kdrl_mcore.cli.serve_teacher import parser

    options = parser().parse_args(arguments)
    with Program() as program:
        program.join(TIMEOUT_MINUTES)
        logging.getLogger("kdrl_mcore").setLevel(logging.INFO)
        _serve(options)
        program.leave()
    return program.exit_code


def _serve(options: argparse.Namespace) -> None:
    # Megatron-Core reads torch.cuda when it is imported, so the platform is prepared first.
    from kdrl_mcore.convert.load import load_weights
    from kdrl_mcore.data.tokenizers import load_tokenizer
    from kdrl_mcore.model.families import config_folder, read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.parallel.layout import Layout, create_scoring_groups
    from kdrl_mcore.teacher.addresses import TOKEN_VARIABLE, write_address
    from kdrl_mcore.teacher.state_server import ServedModel, StateServer, run_server

    if not Path(options.model).is_dir():
        raise ConfigError(f"--model {options.model} is not a folder: name an HF model directory")
    architecture = read_architecture(options.model)
    folder = config_folder(options.model)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    most = architecture.vocab_size if tokenizer is None else min(architecture.vocab_size, tokenizer.vocab_size)
    columns = options.vocabulary or most
    if columns > architecture.vocab_size:
        raise ConfigError(f"--vocabulary {columns} is more than the model's {architecture.vocab_size} columns: lower it")
    groups = create_scoring_groups(Layout(dist.get_world_size(), tensor=options.tensor))
    parts = build_model(architecture, ModelConfig(dtype=options.dtype), groups, vocab_size=columns, trainable=False)
    load_weights(parts, options.model)
    server = None
    if dist.get_rank() == 0:
        positions = min(options.max_model_len or architecture.context_length, architecture.context_length)
        served = ServedModel(fingerprint(options.model), architecture.hidden_size, columns, positions)
        token = os.environ.get(TOKEN_VARIABLE)
        server = StateServer(served, tokenizer, options.host, options.port, token)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        server.start()
        url = f"http://{options.host}:{server.port}"
        if options.run_dir is not None:
            write_address(options.run_dir, options.name, options.index, url, token)
        print(f"the teacher {options.model} is served at {url}", flush=True)
    else:
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 ends them all
            signal.signal(number, signal.SIG_IGN)
    run_server(parts, server, options.step_tokens)


if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main(sys.argv[1:]))
