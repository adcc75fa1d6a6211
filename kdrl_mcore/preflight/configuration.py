"""Checks of the configuration: its models, layouts, engines and data, and the memory that they need."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config, load_benchmark
from kdrl_mcore.config.derived import (
    engines_share_gpus,
    evaluated_limit,
    known_models,
    loaded_teachers,
    longest_response,
    reads_scores,
    replays,
    samples_with_vllm,
    separate_teachers,
    served_teachers,
    used_models,
    uses_given,
)
from kdrl_mcore.convert.adapted import open_weights
from kdrl_mcore.convert.fingerprint import weights_fingerprint
from kdrl_mcore.convert.hf_files import unread_files
from kdrl_mcore.convert.peft_folder import check_peft_folder, check_student_base, check_teacher_adapters
from kdrl_mcore.convert.weight_map import check_names
from kdrl_mcore.data.files import is_file
from kdrl_mcore.data.limits import (
    Limits,
    check_prompts,
    check_rollouts,
    check_teacher_prompts,
    check_teacher_rollouts,
    limits_of,
)
from kdrl_mcore.data.sources import data_notes, read_domains, training_sources
from kdrl_mcore.data.stream import Domain
from kdrl_mcore.data.taught import describe_taught
from kdrl_mcore.data.tokenizers import load_tokenizer
from kdrl_mcore.data.vocabulary import shared_vocabulary, unshared_tokens
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.evaluation.benchmarks import check_benchmark, load_benchmarks
from kdrl_mcore.model.activations import Activations
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.lora_targets import check_lora
from kdrl_mcore.monitoring.loggers.choice import check_logger_packages
from kdrl_mcore.parallel.collect import gather_objects, on_first_rank
from kdrl_mcore.parallel.host_limits import free_memory
from kdrl_mcore.parallel.layout import student_layout, teacher_layout
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.planning.host_memory import num_parameters, too_little_memory
from kdrl_mcore.planning.memory import GIB, plan_run_memory
from kdrl_mcore.preflight.findings import CheckFailed
from kdrl_mcore.rollout.files import read_rollouts
from kdrl_mcore.rollout.given import read_given
from kdrl_mcore.rollout.vllm.host_memory import engine_gib
from kdrl_mcore.rollout.vllm.placement import check_installed, find_owners
from kdrl_mcore.run_directory.export import check_export
from kdrl_mcore.teacher.addresses import find_addresses
from kdrl_mcore.teacher.connect import expected_of, make_client
from kdrl_mcore.teacher.recorded import read_recorded


def check_models(config: Config) -> str:
    """Models and tokenizers are complete on every node, and student and teacher share their tokens."""
    models, known, described = used_models(config), list(known_models(config).values()), []
    if config.checkpoint.export_hf:
        check_export(Path(config.run.dir), known, adapters=config.student.lora.rank > 0)
    if (lora := config.student.lora).rank:
        check_student_base(models["student"])
        check_lora(lora, read_architecture(models["student"]), config.parallel.tensor)
        if lora.path is not None:
            check_peft_folder(lora.path, lora)
    if config.teacher.weights == "adapters":
        check_teacher_adapters(str(config.teacher.path), models["student"])
    for name, path in models.items():
        architecture = read_architecture(path)
        with open_weights(path) as weights:
            check_names(weights, architecture, FAMILIES[architecture.family].rules(architecture))
        described.append(f"{name} {path} ({num_parameters(architecture) / 1e9:.2f}B parameters)")
        described += [f"{path} also holds {file}, which is not read" for file in unread_files(path)]
    tokenizer, vocab_size = shared_vocabulary(*known, added_may_differ=True)
    if tokenizer is None and not replays(config):
        raise ConfigError(f"{config.student.path} has no tokenizer.json, which sampling needs")
    return f"{'; '.join(described)}; {vocab_size} tokens"


def check_layout(config: Config) -> str:
    """Both layouts fit the number of ranks and the models, and the student has the parts to recompute or off-load."""
    # Megatron-Core reads torch.cuda when it is imported, so it is imported only here, after the platform is set up.
    from kdrl_mcore.model.gpt import check_layout as check_fit
    from kdrl_mcore.model.layer_spec import uses_transformer_engine

    world_size = dist.get_world_size()
    layouts, models = {"student": student_layout(world_size, config.parallel)}, used_models(config)
    for role, teacher in zip(list(models)[1:], loaded_teachers(config).values(), strict=True):
        layouts[role] = teacher_layout(world_size, teacher.parallel)
    for name, layout in layouts.items():
        check_fit(read_architecture(models[name]), layout, trainable=name == "student")
    student = read_architecture(models["student"])
    Activations.of(config.parallel).check(student, transformer_engine=uses_transformer_engine(config.model))
    return "; ".join(
        f"{name}: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {layout.data}"
        for name, layout in layouts.items()
    )


def check_engines(config: Config) -> str:
    """vLLM's engines fit the student's heads; where ranks start them, vLLM is installed and they fit the ranks' GPUs."""
    settings = config.rollout.vllm
    if not samples_with_vllm(config):
        return "no vLLM engines"
    architecture, tensor = read_architecture(str(config.student.path)), settings.tensor
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    if heads % tensor or max(kv_heads, tensor) % min(kv_heads, tensor):
        raise ConfigError(
            f"rollout.vllm.tensor={tensor} does not divide the student's {heads} heads ({kv_heads} key-value heads): change it"
        )
    if settings.placement == "server":
        return f"servers of tensor {tensor}"
    check_installed()
    return f"{len(find_owners(config))} engines of tensor {tensor} on the ranks' GPUs"


def check_data(config: Config) -> str:
    """Files of prompts and rollouts exist on every node (any other name counts as a hub id). All prompts to train or
    evaluate on are read as in training, once on each node, and their verifiers accept each of the reference answers."""
    sources = [str(source.path) for source, _ in training_sources(config)] if config.data.train or config.data.sources else []
    held_out = [source.eval for source in config.data.sources] if config.eval.every >= 0 else []
    named = [path for path in (*sources, config.data.eval, *held_out, config.rollout.path, config.rollout.given.path) if path]
    for path in named:
        if is_file(path) and not Path(path).is_file():
            raise DataError(f"{path} is not on {socket.gethostname()}: name a file that every node can read")
    if not named:
        raise ConfigError("neither data.train nor rollout.path is set: name the prompts, or a rollout file")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return ""
    if not (Path(str(config.student.path)) / "tokenizer.json").is_file():  # `check_models` reports it where it is an error
        return ", ".join(named)
    tokenizer = load_tokenizer(str(config.student.path))
    domains: list[Domain] = []
    if not replays(config):
        domains = [Domain(table.domain, table) for table in read_domains(config, tokenizer, all_golds=True)]
    benchmarks = []
    if config.eval.every >= 0:
        benchmarks = load_benchmarks(config, tokenizer)
        for benchmark in benchmarks:
            check_benchmark(benchmark, benchmark.reward or config.reward.kind, config.reward, everything=True)
    counted = [f"{path} ({len(domain.prompts)} prompts)" for path, domain in zip(sources, domains, strict=False)]
    counted += [f"{benchmark.name} ({len(benchmark.prompts)} held out)" for benchmark in benchmarks]
    taught = describe_taught(config, [domain.prompts for domain in domains]) if domains else []
    return ". ".join([", ".join(counted or named), *taught, *data_notes(domains, benchmarks)])


def check_lengths(config: Config) -> str:
    """The models know the token ids of all prompts and rollouts, which with their responses fit the models' positions."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return ""
    models = list(known_models(config).values())
    tokenizer, vocab_size = shared_vocabulary(*models, added_may_differ=True)
    unshared = _unshared(config)
    limits, most = limits_of(config, vocab_size), config.rollout.max_response_tokens
    checked = []
    if replays(config):
        assert config.rollout.path is not None
        rollouts = read_rollouts(config.rollout.path)
        check_rollouts(rollouts, config.rollout.path, limits)
        check_teacher_rollouts(rollouts, config.rollout.path, config, unshared)
        if reads_scores(config):
            read_recorded(config.rollout.path, config, vocab_size)
        checked.append(config.rollout.path)
    elif tokenizer is not None and (config.data.train or config.data.sources):
        for table in read_domains(config, tokenizer):
            check_prompts(table, table.source, limits, longest_response(config))
            check_teacher_prompts(table, table.source, config, unshared)
            checked.append(table.source)
    if uses_given(config) and config.rollout.given.path is not None:
        read_given(config.rollout.given.path, limits, most)
        checked.append(config.rollout.given.path)
    if tokenizer is not None and config.eval.every >= 0:
        own = Limits.of(read_architecture(models[0]).vocab_size, models[:1])
        for benchmark in load_benchmarks(_only_files(config), tokenizer):
            check_prompts(benchmark.prompts, benchmark.name, own, *evaluated_limit(config))
            checked.append(benchmark.name)
    return f"{', '.join(checked) or 'no file'}: within {limits.positions} positions"


def check_teachers(config: Config) -> str:
    """The servers of teachers answer on every node and are the expected teachers. Those in RUN/teachers start only after the
    preflight, and are checked when the run starts."""
    served = served_teachers(config)
    if not served or os.environ.get("LOCAL_RANK", "0") != "0":
        return "" if served else "no teacher on servers"
    tokenizer, vocab_size = shared_vocabulary(*known_models(config).values(), added_may_differ=True)
    unshared, found = _unshared(config), []
    for name, teacher in served.items():
        if not teacher.server.urls:
            found.append(f"{name}: servers in RUN/teachers, checked when the run starts")
            continue
        client = make_client(config, teacher, partial(find_addresses, config, name, teacher.server), 1, vocab_size)
        weights = weights_fingerprint(teacher.path)
        try:
            found.append(
                f"{name}: {client.check(expected_of(config, name, tokenizer, vocab_size, unshared.get(name, ()), weights))}"
            )
        finally:
            client.close()
    return "; ".join(found)


def _unshared(config: Config) -> dict[str, dict[int, str]]:
    """By teacher, the student's added tokens at whose ids it has others."""
    student = str(config.student.path)
    return {name: unshared_tokens(student, teacher.path) for name, teacher in separate_teachers(config).items() if teacher.path}


def _only_files(config: Config) -> Config:
    """The configuration with only those evaluation sets that are files on this machine."""
    found = config.data.eval if config.data.eval and Path(config.data.eval).is_file() else None
    benchmarks = [name for name in config.eval.benchmarks if Path(load_benchmark(name).source).is_file()]
    sources = [
        source if source.eval and Path(source.eval).is_file() else replace(source, eval=None) for source in config.data.sources
    ]
    return replace(
        config, data=replace(config.data, eval=found, sources=sources), eval=replace(config.eval, benchmarks=benchmarks)
    )


def check_memory(config: Config) -> str:
    """Every rank's planned memory (docs/planning.md) fits the smallest GPU; rank 0 makes the plan. Without GPUs, each machine
    has the memory that its ranks and engines cannot do without."""
    if not torch.cuda.is_available():
        wrong = too_little_memory(config, _engines_gib(config))
        if wrong is not None:
            raise CheckFailed(wrong)
        return f"{free_memory() / GIB:.1f} GiB are free; kdrl-plan shows the memory that this run needs on a GPU"
    smallest = min(gather_objects(torch.cuda.get_device_properties(device()).total_memory)) / GIB
    planned = on_first_rank(lambda: plan_run_memory(config, dist.get_world_size(), smallest))
    worst = max(planned, key=lambda rank: rank.peak)
    held = ", ".join(f"{item.kind} {item.bytes / GIB:.1f}" for item in worst.items if item.bytes >= GIB / 20)
    text = f"at most {worst.peak / GIB:.1f} GiB a rank, in {worst.fullest} ({held}), of {smallest:.0f}"
    if not worst.fits:
        raise CheckFailed(f"{text}: kdrl-plan with the same overrides shows what would make it fit")
    return text


def _engines_gib(config: Config) -> float:
    """The GiB that the engines of this machine need, without GPUs."""
    if not engines_share_gpus(config.rollout):
        return 0.0
    settings, here = config.rollout.vllm, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = dist.get_rank() - int(os.environ.get("LOCAL_RANK", "0"))
    engines = sum(first <= owner < first + here for owner in find_owners(config))
    return engines * engine_gib(str(config.student.path), config.model.dtype, settings.tensor, settings.kv_cache_gib)


def check_loggers(config: Config) -> str:
    """The packages of the run's loggers are installed for rank 0, which alone starts them."""
    names = on_first_rank(lambda: check_logger_packages(config.logging))
    return ", ".join(["metrics.jsonl", *names])
