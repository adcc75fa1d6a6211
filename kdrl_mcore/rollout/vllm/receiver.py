"""Reads the student's weights in an engine's worker. It does not need vLLM."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.refit.reader import WeightReader
from kdrl_mcore.rollout.vllm.gpu_memory import give_back

logger = logging.getLogger(__name__)


class WeightReceiver(ABC):
    """One of an engine's workers, as a refit sees it."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        """Args:
        rank, world_size: among the engine's workers.
        """
        self.rank, self.world_size, self.device = rank, world_size, device

    def receive_weights(self, spec: dict) -> dict:
        """Load the weights that a trainer sends.

        Args:
            spec: from the server's request, as `WeightWriter` made it.

        Returns:
            The digest of the received weights, and the number of tensors and bytes.

        Raises:
            RefitError: the transfer failed; the message names the tensor. The weights are then a mixture of old and new.
        """
        reader = WeightReader(spec, self.rank, self.world_size, self.device)
        try:
            self.load_received(iter(reader))
        finally:
            reader.close()
            give_back()  # frees the memory in which tensors were assembled, for the KV cache that wakes next
        if not reader.result:
            raise RefitError(f"worker {self.rank} did not read all tensors")
        return reader.result

    def try_to_receive_weights(self, spec: dict) -> dict:
        """Like `receive_weights`, but returns an error as a result too (`error`): after a worker's exception vLLM would
        mistake the other workers' results for those of the next call."""
        try:
            return self.receive_weights(spec)
        except Exception as error:
            logger.exception("worker %d did not receive its weights", self.rank)
            return {"error": str(error) or type(error).__name__}

    @abstractmethod
    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load tensors that arrive under their HF names."""
