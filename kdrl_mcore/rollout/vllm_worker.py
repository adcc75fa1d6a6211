"""What vLLM's workers can do more (`worker_extension_cls`): read the student's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.gpu_memory import give_back
from kdrl_mcore.rollout.weight_reader import WeightReader

logger = logging.getLogger(__name__)


class RefitWorker:
    """Mixed into each worker of an engine."""

    rank: int
    device: torch.device
    parallel_config: Any

    def receive_weights(self, spec: dict) -> dict:
        """Load what a trainer sends.

        Args:
            spec: of the server's request, as `WeightWriter` made it.

        Returns:
            The digest of what was received, and the number of its tensors and bytes.

        Raises:
            RefitError: naming the tensor. The weights are then a mixture.
        """
        reader = WeightReader(spec, self.rank, self.parallel_config.world_size, self.device)
        try:
            self.load_received(iter(reader))
        finally:
            reader.close()
            give_back()  # where tensors were put together: the KV cache, which wakes next, takes all that is left
        if not reader.result:
            raise RefitError(f"worker {self.rank} did not read all tensors")
        return reader.result

    def try_to_receive_weights(self, spec: dict) -> dict:
        """`receive_weights`, but an error is an answer too (`error`): after a worker's exception vLLM takes the other workers'
        answers for those to the next call."""
        try:
            return self.receive_weights(spec)
        except Exception as error:
            logger.exception("worker %d did not get its weights", self.rank)
            return {"error": str(error) or type(error).__name__}

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load tensors that come under their HF names."""
        from kdrl_mcore.rollout.vllm_reload import reload_weights

        reload_weights(self, weights)
