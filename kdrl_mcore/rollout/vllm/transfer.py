"""The backend of vLLM's weight transfer (0.32 and 0.33) by which a refit's weights reach a worker, and are loaded in place.

vLLM's worker processes import this module for `RefitWorker`, which registers the backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from kdrl_mcore.rollout.vllm.receiver import WeightReceiver

BACKEND = "kdrl"
"""The backend's name in vLLM's configuration."""


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Nothing: each refit makes its own connection."""


@dataclass
class RefitInfo(WeightTransferUpdateInfo):
    """One refit; `spec` is what `WeightWriter` made."""

    spec: dict[str, Any]


class RefitBackend(WeightTransferEngine[NoInitInfo, RefitInfo]):
    """Receives a refit in one update.

    vLLM gathers a layer's tensors, then processes them (on CPU it packs them for its kernels) into the memory of the old ones.
    If the stream breaks off, some layers are incomplete, and vLLM would add the next stream's tensors to them. An update
    therefore never raises: it ends with the tensors that have arrived, and the report contains the error. The weights are then
    wrong until the next refit, which replaces all of them.
    """

    init_info_cls, update_info_cls = NoInitInfo, RefitInfo
    report: dict[str, Any]
    """The result of `WeightReceiver.try_to_receive_weights` in the last update."""

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """See vLLM."""

    def start_weight_update(self) -> None:
        """See vLLM."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See vLLM, whose implementation waits for an accelerator and fails without one."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: RefitInfo) -> None:
        """See vLLM."""
        config = self.vllm_config.parallel_config
        receiver = _Loading(config.rank, config.world_size, self.device, self.model)
        self.report = receiver.try_to_receive_weights(update_info.spec)

    def finish_weight_update(self) -> None:
        """See vLLM."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        """See vLLM."""


class _Loading(WeightReceiver):
    def __init__(self, rank: int, world_size: int, device: torch.device, model: nn.Module) -> None:
        super().__init__(rank, world_size, device)
        self._model: Any = model

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """See `WeightReceiver`."""
        self._model.load_weights(weights)


class RefitWorker:
    """An extension of vLLM's workers (`worker_extension_cls`), which reports the result of an update."""

    weight_transfer_engine: Any

    def refit_report(self) -> dict[str, Any]:
        """`RefitBackend.report`."""
        return self.weight_transfer_engine.report


def _repack_tied_head(model: nn.Module) -> None:
    """On CPU vLLM computes with a packed copy of each matrix. Its reload does not update the copy of a head that shares the
    embedding's weight, so the head would keep its old weights."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine(BACKEND, RefitBackend)
