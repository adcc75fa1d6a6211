"""Checks of `parallel`: the student's layout, its activations, and the reduction of its gradients."""

from __future__ import annotations

from kdrl_mcore.config.derived import uses_distributed_optimizer
from kdrl_mcore.config.keys import nearest
from kdrl_mcore.config.schema import DEFAULT_RECOMPUTE, OFFLOAD_MODULES, RECOMPUTE_MODULES, Config, ParallelConfig
from kdrl_mcore.errors import ConfigError

RECOMPUTED_PARTS = {
    "core_attn": ("core_attn",),
    "layernorm": ("qkv_linear", "mlp", "moe"),  # each begins with its norm
    "mlp": ("mlp",),
    "moe": ("moe",),
    "moe_act": ("moe",),
}
"""For each recomputed module, the off-loadable parts that contain it."""


def check_layout(parallel: ParallelConfig) -> None:
    """Check the layout's sizes; model/gpt.py checks them against the model.

    Raises:
        ConfigError: the message names the key and what to set instead.
    """
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tensor > 1")
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} cuts the layers of pipeline ranks: it needs "
            "parallel.pipeline > 1 (or set it to null)"
        )


def check_activations(parallel: ParallelConfig) -> None:
    """Check which activations are recomputed and off-loaded; model/activations.py checks them against the model.

    Raises:
        ConfigError: the message names the key and what to set instead.
    """
    recomputed, offloaded = parallel.recompute_modules, parallel.offload_activations
    for key, names, known in (
        ("recompute_modules", recomputed, RECOMPUTE_MODULES),
        ("offload_activations", offloaded, OFFLOAD_MODULES),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(f"parallel.{key}: {name} is not one of: {', '.join(known)}{nearest(name, known)}")
            if names.count(name) > 1:
                raise ConfigError(f"parallel.{key} names {name} twice: leave one out")
    if "attn_proj" in offloaded and "core_attn" not in offloaded:
        raise ConfigError(
            "parallel.offload_activations: the input of attn_proj is the output of core_attn, which also keeps it: name both"
        )
    if parallel.recompute != "selective":
        if sorted(recomputed) != sorted(DEFAULT_RECOMPUTE):
            raise ConfigError("parallel.recompute_modules needs parallel.recompute=selective")
        if parallel.recompute == "full" and offloaded:
            raise ConfigError(
                "parallel.recompute=full keeps only the inputs of layers, so parallel.offload_activations has nothing to move: "
                "leave it out, or set parallel.recompute=selective"
            )
        return
    if not recomputed:
        raise ConfigError("parallel.recompute=selective with no parallel.recompute_modules: name some, or set it to none")
    if "moe" in recomputed and "moe_act" in recomputed:
        raise ConfigError("parallel.recompute_modules: moe already recomputes moe_act; leave one out")
    for module, parts in RECOMPUTED_PARTS.items():
        both = [part for part in offloaded if module in recomputed and part in parts]
        if both:
            raise ConfigError(
                f"parallel.recompute_modules has {module} and parallel.offload_activations has {both[0]}, which covers it: "
                "recomputed activations are not kept, so leave one out"
            )


def check_reduction(config: Config) -> None:
    """Check how gradients are reduced and updated weights are gathered.

    Raises:
        ConfigError: the message names the key and what to set instead.
    """
    parallel = config.parallel
    for key, cut in (
        ("parallel.bucket_size", parallel.bucket_size is not None),
        ("parallel.overlap_param_gather", parallel.overlap_param_gather),
    ):
        if cut and not parallel.overlap_grad_reduce:
            raise ConfigError(f"{key} needs buckets, which exist only with parallel.overlap_grad_reduce=true")
    if parallel.overlap_param_gather and not uses_distributed_optimizer(config):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and optimizer.name=adam: otherwise "
            "every rank updates all its weights and gathers none"
        )
