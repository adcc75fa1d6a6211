"""All code that depends on the Megatron-Core version (0.16 to 0.19) or on whether its CUDA extras are installed."""

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
from functools import cache, partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch

from kdrl_mcore.resilience.interrupt import end_with_parent

logger = logging.getLogger(__name__)


@cache
def why_no_transformer_engine() -> str | None:
    """The reason why Transformer Engine cannot be used in this process; None where it can. Imports it, once.

    Megatron-Core uses it wherever it is installed, even without a GPU, and cannot be imported where it is broken (built for
    another torch, or a CUDA library is missing). Where it cannot be used it is therefore hidden from this process: call this
    before importing anything of Megatron-Core.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        reason = "Transformer Engine needs a GPU, and there is none"
    else:
        try:
            importlib.import_module("transformer_engine.pytorch")
            return None
        except Exception as error:  # failures to load its libraries come in many types
            first_line = str(error).partition("\n")[0]
            reason = f"Transformer Engine is installed but cannot be imported ({type(error).__name__}: {first_line})"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("%s on %s: using Megatron-Core's own layers instead", reason, socket.gethostname())
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # importing it now raises ImportError
    return reason


def layer_submodules(use_transformer_engine: bool, qk_norm: bool, num_experts: int | None) -> Any:
    """Megatron-Core's own transformer layer, as a spec whose submodules the caller may replace."""
    from megatron.core.models.gpt import gpt_layer_specs

    _recompute_without_compiler()
    if use_transformer_engine:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=qk_norm
        )
    _recompute_without_fp8()
    layer = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=qk_norm)
    if num_experts is not None:
        _prepare_local_experts()
        # The local layer saves this norm as fused into a dense MLP, unlike Transformer Engine's layer with experts.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return layer


def feed_forward_submodules(layer: Any, has_experts: bool) -> Any:
    """The linear layers (`linear_fc1`, `linear_fc2`) of a layer's MLP or of its experts, to be replaced in the spec."""
    submodules = _submodules(layer.submodules.mlp)
    return _submodules(submodules.experts) if has_experts else submodules


def shared_expert_submodules(layer: Any) -> Any:
    """The linear layers of the shared experts of a layer with experts, to be replaced in the spec."""
    return _submodules(_submodules(layer.submodules.mlp).shared_experts)


def separate_norms(layer: Any, has_experts: bool) -> None:
    """Replace the layers of Transformer Engine's spec that are a norm and a linear layer in one by one of each."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.submodules.input_layernorm = TENorm
    layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    if not has_experts:  # before which the norm is separate anyway
        layer.submodules.pre_mlp_layernorm = TENorm
        feed_forward_submodules(layer, has_experts).linear_fc1 = TEColumnParallelLinear


def drop_norms_before(layer: Any, *, use_transformer_engine: bool) -> None:
    """Take the norms before attention and MLP out of a dense layer's spec."""
    from megatron.core.transformer.identity_op import IdentityOp

    if use_transformer_engine:
        separate_norms(layer, has_experts=False)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp


def _submodules(spec: Any) -> Any:
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules  # 0.19, 0.16


def _recompute_without_fp8() -> None:
    """Make Megatron-Core's recompute of norms work without Transformer Engine. Idempotent.

    By default it takes anything but None for FP8, `False` too, and then calls Transformer Engine, installed or not.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _recompute_without_compiler() -> None:
    """Make Megatron-Core's selective recompute of norms and activations copy what it recomputed, as before 0.19. Idempotent.

    From 0.19 on it shares the storage instead, with a C++ function that torch compiles in the first backward pass. That takes a
    compiler on every node and about a minute, and if the process is killed meanwhile, torch's lock file in the user's cache
    stays behind, for which every later run waits forever and silently.
    """
    from megatron.core.tensor_parallel import random

    if hasattr(random, "_get_share_storage"):
        setattr(random, "_get_share_storage", lambda: _copy_storage)  # noqa: B010


@torch.no_grad()
def _copy_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Fill the emptied storage of `output`, which views may share, with that of `recomputed`."""
    storage = recomputed.untyped_storage()
    output.untyped_storage().resize_(storage.size())
    output.untyped_storage().copy_(storage)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Inside this context Transformer Engine's layers, if they can be used, keep references to their weights during a forward
    pass: autograd's hooks for saved tensors return a weight without its `main_grad` and the attributes that DDP relies on.

    The layers keep them if Transformer Engine's own off-load is on. Megatron-Core sets the same flag for its off-load, but from
    2.10 on Transformer Engine respects it only if its first version of off-load is selected, too.
    """
    if why_no_transformer_engine() is not None:
        yield
        return
    from transformer_engine.pytorch import cpu_offload

    first_form = getattr(cpu_offload, "v1_code_path", cpu_offload)
    before = getattr(cpu_offload, "NVTE_CPU_OFFLOAD_V1", None)
    first_form.CPUOffloadEnabled, cpu_offload.NVTE_CPU_OFFLOAD_V1 = True, True
    try:
        yield
    finally:
        first_form.CPUOffloadEnabled, cpu_offload.NVTE_CPU_OFFLOAD_V1 = False, before


def _prepare_local_experts() -> None:
    """Make Megatron-Core's mixture of experts work without Transformer Engine and on CPU. Idempotent."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 reads it even where Transformer Engine is missing

    def split_sizes_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts only tensors on a GPU, but the collectives need numbers rather than tensors on the CPU too.
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return moe_utils.maybe_move_tensor_to_cpu(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_as_numpy


def use_adam(adam: type[torch.optim.Optimizer]) -> None:
    """Register the Adam that Megatron-Core's optimizers use where neither Transformer Engine nor Apex provides one."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if getattr(optimizer, "USING_PYTORCH_OPTIMIZER", True):
        for module in (optimizer, distrib_optimizer):
            module.Adam = adam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        # Its state has the same structure as Apex's, so it is saved and loaded in the same way.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark the weights that tensor-parallel ranks split, which Megatron-Core does only when it initialises them.

    Its gradient norm takes an unmarked weight for one that every rank holds whole, and counts only tensor rank 0's share.
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


def leave_out_collectives(linear: Any) -> None:
    """Have a column- or row-parallel linear layer only multiply, as the layers of experts do: its caller gathers or copies the
    input, and reduces the output. Megatron-Core's layers have a mark for that, Transformer Engine's a mode."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    if isinstance(linear, (ColumnParallelLinear, RowParallelLinear)):
        linear.explicit_expert_comm = True
    else:
        linear.parallel_mode, linear.sequence_parallel = None, False


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Make Transformer Engine's linear layers add each weight's gradient to its `main_grad` (from DDP) within the matrix
    product, rather than pass it to autograd in the weight's dtype.

    Megatron-Core's own setting (`gradient_accumulation_fusion`) requires Apex for the output head, whose gradient does not come
    from its module here.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def build_optimizer(settings: Any, model_chunks: list[Any]) -> Any:
    """Megatron-Core's optimizer. Its parameter groups have `wd_mult` 0 for norms and biases; the caller applies it."""
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

    optimizer = get_megatron_optimizer(
        settings,
        model_chunks,
        config_overrides=get_standard_config_overrides(settings),
        use_gloo_process_groups=False,  # they are for a checkpoint format that is not used
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "init_state_fn", None) is None:
            part.init_state_fn = _no_state  # sgd has none, but loading a checkpoint calls it
    return optimizer


def _no_state(*_: Any) -> None:
    """Initialise the state of an optimizer that has none."""


def clip_gradients(optimizer: Any, max_norm: float, total_norm: float) -> None:
    """Scale the main gradients so that their global norm `total_norm` becomes at most `max_norm`."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=total_norm)


def copy_to_model(optimizer: Any) -> None:
    """Copy the float32 weights that the optimizer updates to the model's, where these are others. A distributed optimizer
    copies only its share; a gather must follow."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        copy = getattr(part, "_copy_main_params_to_model_params", None)
        if copy is not None and not getattr(part, "is_stub_optimizer", False):
            copy()


def finish_param_gather(chunk: Any) -> None:
    """Wait for the all-gathers of weights that `start_param_sync` of this DDP chunk started."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.param_gather_dispatched:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def weights_to_load(model: Any) -> dict[str, Any]:
    """A model chunk's weights as Megatron's sharded tensors, without its modules' `_extra_state` (for FP8; empty here).
    Transformer Engine's layers and Megatron-Core's own have it in different modules, and a checkpoint of either must load into
    the other."""
    return {name: value for name, value in model.sharded_state_dict().items() if not _is_extra_state(name)}


def take_weights(model: Any, weights: dict[str, Any]) -> None:
    """Load into the model what `dist_checkpointing.load` returned for `weights_to_load`.

    Raises:
        RuntimeError: a weight is missing, or does not belong to the model.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if not _is_extra_state(name)] + unexpected
    if wrong:
        raise RuntimeError(f"the model and the checkpoint do not have the same weights: {wrong[0]} ({len(wrong)} in all)")


def _is_extra_state(name: str) -> bool:
    return "_extra_state" in name.rpartition(".")[2]


def why_unreadable(weights: Path) -> str | None:
    """The reason why this Megatron-Core cannot load a complete torch_dist folder; None where it can. From 0.19 on the state
    common to all ranks is written with the shards, where earlier versions do not look for it."""
    import megatron.core
    from megatron.core.dist_checkpointing.strategies import common

    if not hasattr(common, "TorchCommonSaveStrategy") or (weights / "common.pt").is_file():
        return None
    return (
        f"it was written by Megatron-Core 0.19 or later, but {megatron.core.__version__} is installed: install a later version"
    )


def parallel_save_strategy(replicas: torch.distributed.ProcessGroup) -> Any:
    """The strategy that writes checkpoints: ranks of the group that hold the same data each write a share of it.

    The shares are agreed on at the first save and kept, so a strategy can be used for one model only.
    """
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    strategy = get_default_save_sharded_strategy()
    strategy.async_save = partial(_save_without_copies, strategy.async_save)
    return FullyParallelSaveStrategyWrapper(strategy, replicas, do_cache_distribution=True)


def _save_without_copies(save: Callable[..., Any], state: dict[str, Any], *args: Any, **settings: Any) -> Any:
    """Save without copying tensors in host memory: forked processes write them, and see them as they were at the fork.

    Megatron-Core's writer copies each tensor that is part of a larger storage, as weights are part of DDP's buffers.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            tensor.data = _with_own_storage(tensor.data.detach())
    return save(state, *args, **settings)


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage that ends where the tensor does, because torch saves whole storages."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    memory = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return memory.view(tensor.dtype).view(tensor.shape)


def save_settings() -> dict[str, str]:
    """Arguments of `dist_checkpointing.save` that choose Megatron-Core's own asynchronous writer where another package's is the
    default (from 0.19 on)."""
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def common_state(state: dict[str, Any]) -> dict[str, Any]:
    """The unsharded part of a sharded state dict: hyper-parameters, the same on every rank."""
    from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

    common: dict[str, Any] = extract_sharded_base(extract_nonpersistent(state)[1])[1]
    return common


def write_common_state(common: dict[str, Any], folder: Path) -> None:
    """Write the common state where releases before 0.19 look for it. Later releases store it with the shards and read both."""
    file = folder / "common.pt"
    if not file.exists():
        torch.save(common, file)


def new_write_results_queue() -> None:
    """Give the next save a queue of its own for the results of its writers, in a process that ends with this one.

    Megatron-Core has one queue for all saves: what a save that was given up leaves there would be taken for the results of the
    next one, whose checkpoint could then not be read. And the process that it would start outlives a rank that is killed or
    ends in a hang, and keeps the rank's output open, so that whoever reads the output waits forever.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = _write_results_process().Queue()


@cache
def _write_results_process() -> SyncManager:
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent, (os.getpid(),))
    return manager


@contextmanager
def rank_0_write_errors() -> Iterator[list[Exception]]:
    """Collect errors in the small checkpoint files that Megatron-Core writes on rank 0 only (common.pt, .metadata,
    metadata.json) in a list rather than raise them: a collective follows, in which the other ranks would wait forever. The
    caller must pass the errors on to them."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    errors: list[Exception] = []

    def collecting(write: Callable[..., Any], file: str) -> Callable[..., Any]:
        def collect(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter
                errors.append(OSError(f"{file}: {error}"))  # torch's own message does not name the file

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
    """Free the buffer into which Megatron-Core gathers activations under sequence parallelism; it keeps the largest one."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is not None:  # the student's, where there is one
        parallel_state._GLOBAL_MEMORY_BUFFER.buffer.clear()
