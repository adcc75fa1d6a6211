"""The one file that knows what differs between Megatron-Core versions (0.16 to 0.19) and between machines with and without
its CUDA extras."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from kdrl_mcore.interrupt import end_with_parent

logger = logging.getLogger(__name__)


@cache
def why_no_transformer_engine() -> str | None:
    """Why Transformer Engine cannot serve in this process; None where it can. Imports it, once.

    Megatron-Core takes what it finds, also without a GPU, and does not import itself where Transformer Engine is there but
    broken (built for another torch, a CUDA library missing). So where it cannot serve it is hidden from this process: call this
    before anything of Megatron-Core is imported.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        reason = "Transformer Engine needs a GPU, and there is none"
    else:
        try:
            importlib.import_module("transformer_engine.pytorch")
            return None
        except Exception as error:  # whatever stops its libraries from loading comes in its own type
            first_line = str(error).partition("\n")[0]
            reason = f"Transformer Engine is installed but does not import ({type(error).__name__}: {first_line})"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("%s on %s: Megatron-Core's own layers serve instead", reason, socket.gethostname())
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # importing it is an ImportError from now on
    return reason


def layer_submodules(use_transformer_engine: bool, qk_norm: bool, num_experts: int | None) -> Any:
    """Megatron-Core's own transformer layer, as a spec whose submodules the caller may replace."""
    from megatron.core.models.gpt import gpt_layer_specs

    if use_transformer_engine:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=qk_norm
        )
    layer = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=qk_norm)
    if num_experts is not None:
        _prepare_local_experts()
        # The local layer saves this norm as one fused into a dense MLP, which Transformer Engine's layer with experts has not.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return layer


def _prepare_local_experts() -> None:
    """Mend what Megatron-Core's mixture of experts lacks without Transformer Engine and on CPU. Idempotent."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 reads it also where Transformer Engine is missing

    def split_sizes_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts what comes from a GPU only, but the collectives want numbers, not tensors, from the CPU too.
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return moe_utils.maybe_move_tensor_to_cpu(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_as_numpy


def use_adam(adam: type[torch.optim.Optimizer]) -> None:
    """Register the Adam that Megatron-Core's optimizers build where neither Transformer Engine nor Apex brings one."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if getattr(optimizer, "USING_PYTORCH_OPTIMIZER", True):
        for module in (optimizer, distrib_optimizer):
            module.Adam = adam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        # Its state has Apex's shape, so it is saved and loaded as Apex's would be.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark the weights that tensor-parallel ranks split, as Megatron-Core itself does only where it initialises them.

    Its gradient norm takes an unmarked weight for one that every rank holds whole, and counts tensor rank 0's share alone.
    """
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_tensor_model_parallel_attributes,
    )

    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                dimension = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=dimension, stride=1)


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Have Transformer Engine's linear layers add each weight's gradient to its `main_grad`, which DDP has given it, within the
    matrix product, rather than hand it to autograd in the weight's type.

    Megatron-Core's own setting (`gradient_accumulation_fusion`) wants Apex for the output head, whose gradient is not formed by
    its module here.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def build_optimizer(settings: Any, model_chunks: list[Any]) -> Any:
    """Megatron-Core's optimizer, in whose parameter groups `wd_mult` is 0 for norms and biases: the caller multiplies."""
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

    return get_megatron_optimizer(
        settings,
        model_chunks,
        config_overrides=get_standard_config_overrides(settings),
        use_gloo_process_groups=False,  # for a form of checkpoints that is not used
    )


def clip_gradients(optimizer: Any, max_norm: float, total_norm: float) -> None:
    """Scale the main gradients so that their global norm `total_norm` becomes at most `max_norm`."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=total_norm)


def finish_param_gather(chunk: Any) -> None:
    """Wait for the all-gathers of weights that `start_param_sync` of this DDP chunk began."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.param_gather_dispatched:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def weights_to_load(model: Any) -> dict[str, Any]:
    """A model chunk's weights as Megatron's sharded tensors, without the `_extra_state` of its modules (of FP8 training; empty
    here): under Transformer Engine other modules have one than under Megatron-Core's own layers, and a checkpoint of one is to
    load into the other."""
    return {name: value for name, value in model.sharded_state_dict().items() if not _is_extra_state(name)}


def take_weights(model: Any, weights: dict[str, Any]) -> None:
    """Take over what `dist_checkpointing.load` returned for `weights_to_load`.

    Raises:
        RuntimeError: a weight is missing, or does not belong to the model.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if not _is_extra_state(name)] + unexpected
    if wrong:
        raise RuntimeError(f"the model and what was loaded do not have the same weights: {wrong[0]} ({len(wrong)} such)")


def _is_extra_state(name: str) -> bool:
    return "_extra_state" in name.rpartition(".")[2]


def complete_parameter_groups(optimizer: Any) -> None:
    """After loading, give every parameter group the settings that the checkpoint's optimizer did not have: Transformer Engine's
    Adam reads more of them than the one that serves without it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner: Any = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            for name, value in inner.defaults.items():
                group.setdefault(name, value)


def parallel_save_strategy(replicas: torch.distributed.ProcessGroup) -> Any:
    """How a checkpoint is written: of what several ranks of the group hold alike, each writes a share.

    Who writes what is agreed on at the first save and kept, so one strategy serves checkpoints of one model only.
    """
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), replicas, do_cache_distribution=True)


def save_settings() -> dict[str, str]:
    """Of `dist_checkpointing.save`: Megatron-Core's own writer beside the training process, where another package's is the
    default (from 0.19 on)."""
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def start_write_results_process() -> None:
    """Start the process that brings this one what its checkpoint writers did; it ends with this one. Idempotent.

    The one that Megatron-Core starts lives on when a rank is killed or ends in a hang, and keeps the rank's output open: who
    reads that waits for ever.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


@contextmanager
def rank_0_write_errors() -> Iterator[list[Exception]]:
    """What goes wrong in the small files of a checkpoint that Megatron-Core writes on rank 0 alone (common.pt, .metadata,
    metadata.json) is put into the list, not raised: it calls a collective next, in which the others would wait for ever. The
    caller tells them."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    errors: list[Exception] = []

    def collecting(write: Callable[..., Any], file: str) -> Callable[..., Any]:
        def collect(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter
                errors.append(OSError(f"{file}: {error}"))  # torch's own message does not name it

        return collect

    writers: list[tuple[Any, str, str]] = [
        (FileSystemWriterAsync, "finish", ".metadata"),
        (serialization, "save_config", "metadata.json"),
    ]
    if hasattr(common, "TorchCommonSaveStrategy"):  # from 0.19 on this is written with the shards
        writers.append((common.TorchCommonSaveStrategy, "save_common", "common.pt"))
    originals = [getattr(owner, name) for owner, name, _ in writers]
    for (owner, name, file), original in zip(writers, originals, strict=True):
        setattr(owner, name, collecting(original, file))
    try:
        yield errors
    finally:
        for (owner, name, _), original in zip(writers, originals, strict=True):
            setattr(owner, name, original)


def forward_backward_function(pipeline_size: int, virtual_pipeline_size: int | None) -> Callable[..., list[Any]]:
    """Megatron-Core's schedule for a pipeline of this size."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func(pp_size=pipeline_size, vp_size=virtual_pipeline_size)


def drop_gathering_buffer() -> None:
    """Let go of the memory into which Megatron-Core gathers activations under sequence parallelism: it keeps the largest."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is not None:  # the student's, where there is one
        parallel_state._GLOBAL_MEMORY_BUFFER.buffer.clear()
