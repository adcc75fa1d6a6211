"""Which of a layer's activations are kept for the backward pass, which are recomputed, and which are off-loaded to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdrl_mcore.config import ParallelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families.base import Architecture

OTHER_KIND = {"mlp": "moe", "moe": "mlp"}
"""Every layer has one of the two, so a list may name both: the other one is ignored."""


@dataclass(frozen=True)
class Activations:
    """Which activations are recomputed in the backward pass, and which are held in host memory until then.

    Attributes:
        recompute: none, selective (`modules` of each layer) or full (each layer from its input).
        modules: `core_attn` recomputes attention without its projections (kernels of flash attention keep little more than
            their inputs, but under context parallelism also the keys and values of all ranks). `layernorm` recomputes the norms
            before attention and MLP. `mlp` and `moe` recompute the whole MLP or all experts, `moe_act` only the experts'
            activation function.
        offload: parts of a layer (see offload.py).
        min_elements: smaller tensors are not off-loaded.
    """

    recompute: str = "none"
    modules: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    min_elements: int = 2**20

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Activations:
        """The choices of the student's `parallel` configuration."""
        modules = tuple(parallel.recompute_modules) if parallel.recompute == "selective" else ()
        return cls(parallel.recompute, modules, tuple(parallel.offload_activations), parallel.offload_min_elements)

    def check(self, architecture: Architecture, *, transformer_engine: bool | None) -> None:
        """Refuse names that have no effect in this model.

        Args:
            transformer_engine: whether the layers are Transformer Engine's; None if that is not known.

        Raises:
            ConfigError: a name has no effect.
        """
        _check_kind("recompute_modules", self.modules, architecture)
        _check_kind("offload_activations", self.offload, architecture)
        if "moe_act" in self.modules and transformer_engine is False:
            raise ConfigError(
                "parallel.recompute_modules: moe_act needs Transformer Engine's grouped experts (bfloat16 on CUDA): use moe"
            )
        if "layernorm" in self.modules and transformer_engine and architecture.experts is None:
            raise ConfigError(
                "parallel.recompute_modules: layernorm does nothing here, as Transformer Engine's linear layers contain the "
                "norms of a dense layer: leave it out"
            )


def _check_kind(key: str, names: Sequence[str], architecture: Architecture) -> None:
    experts = architecture.experts is not None
    absent = () if architecture.mixes_layers else ("mlp",) if experts else ("moe", "moe_act")
    for name in names:
        if name in absent and OTHER_KIND.get(name, name) not in {*names} - {name}:
            has = "experts, no dense MLP: name moe" if experts else "no experts: name mlp"
            raise ConfigError(f"parallel.{key}: {name} does nothing here, as the layers of {architecture.family} have {has}")


KEEP_ALL = Activations()
