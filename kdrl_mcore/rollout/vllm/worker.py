"""An extension of vLLM's workers (`worker_extension_cls`) that reads the student's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.refit.reader import WeightReader
from kdrl_mcore.rollout.vllm.gpu_memory import give_back

logger = logging.getLogger(__name__)


class RefitWorker:
    """A mixin for each worker of an engine."""

    rank: int
    device: torch.device
    parallel_config: Any

    def receive_weights(self, spec: dict) -> dict:
        """Load the weights that a trainer sends.

        Args:
            spec: from the server's request, as `WeightWriter` made it.

        Returns:
            The digest of the received weights, and the number of tensors and bytes.

        Raises:
            RefitError: the transfer failed; the message names the tensor. The weights are then a mixture of old and new.
        """
        reader = WeightReader(spec, self.rank, self.parallel_config.world_size, self.device)
        try:
            self.load_received(iter(reader))
        finally:
            reader.close()
            give_back()  # frees the memory in which tensors were assembled, for the KV cache that wakes next
        if not reader.result:
            raise RefitError(f"worker {self.rank} did not read all tensors")
        return reader.result

    def try_to_receive_weights(self, spec: dict) -> dict:
        """Like `receive_weights`, but returns an error as a result too (`error`): after a worker's exception vLLM would take
        the other workers' results for those of the next call."""
        try:
            return self.receive_weights(spec)
        except Exception as error:
            logger.exception("worker %d did not receive its weights", self.rank)
            return {"error": str(error) or type(error).__name__}

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load tensors that arrive under their HF names."""
        from kdrl_mcore.rollout.vllm.reload import reload_weights

        reload_weights(self, weights)
