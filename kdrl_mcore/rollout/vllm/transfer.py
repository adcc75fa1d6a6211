"""The backend of vLLM's weight transfer (0.32 and 0.33) by which a refit's weights reach a worker, and are loaded in place.

vLLM's worker processes import this module for `RefitWorker`, which registers the backend.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.vllm.adapter import adapters_at
from kdrl_mcore.rollout.vllm.receiver import WeightReceiver

_MEMORY = "/dev/shm"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
        if update_info.spec.get("peft_config") is not None:
            self.report = {"error": "the trainer sends adapters, but the engine was started without --lora-rank"}
            return
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


class _Adapters(WeightReceiver):
    """vLLM reads adapters from a PEFT folder only; this one is in memory, where the system has a file system for that."""

    def __init__(
        self, rank: int, world_size: int, device: torch.device, add: Callable[[LoRARequest], bool], spec: dict[str, Any]
    ) -> None:
        super().__init__(rank, world_size, device)
        self._add, self._config = add, spec["peft_config"]

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """See `WeightReceiver`. Nothing is loaded unless every tensor is intact."""
        tensors = {name: tensor.cpu() for name, tensor in weights}
        if self._config is None:
            raise RefitError("the engine takes adapters (--lora-rank), but the trainer sends whole weights")
        with tempfile.TemporaryDirectory(dir=_MEMORY if _has_room(tensors) else None) as folder:
            save_file(tensors, Path(folder) / PEFT_WEIGHTS)
            (Path(folder) / PEFT_CONFIG).write_text(json.dumps(self._config))
            if not self._add(adapters_at(folder, replace=True)):
                raise RefitError("vLLM did not load the adapters")


def _has_room(tensors: dict[str, Tensor]) -> bool:
    """Whether the memory's file system can hold the tensors."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Path(_MEMORY).is_dir() and shutil.disk_usage(_MEMORY).free > 2 * size


class RefitWorker:
    """An extension of vLLM's workers (`worker_extension_cls`), which reports the result of an update."""

    weight_transfer_engine: Any
    vllm_config: Any
    device: torch.device
    add_lora: Any

    def receive_adapters(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Receive adapters, which replace those of the last refit. Returns the result of
        `WeightReceiver.try_to_receive_weights`."""
        config = self.vllm_config.parallel_config
        return _Adapters(config.rank, config.world_size, self.device, self.add_lora, spec).try_to_receive_weights(spec)

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
